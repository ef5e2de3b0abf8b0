"""Where each sequence of a pack begins and ends.

Computed once per pack, on the host, by the encoder's public methods, and passed down as an
argument. Kernels read the tensors on the device, Python reads the host's numbers, and no forward
pass waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from packvit.packs.grid import GridLike, read_grid, sequence_lengths, to_device


@dataclass(eq=False)
class Segments:
    """The varlen arguments of T packed tokens that form S sequences; never changed once built.

    Not a frozen dataclass: torch 2.11 guards on every field of one, and would recompile for each
    number of sequences.
    """

    lengths: tuple[int, ...]  # S host ints: tokens per sequence
    cu_seqlens: Int32[Tensor, " boundaries"]  # [S + 1] on the tokens' device, from 0 up to T
    max_seqlen: int  # host int: tokens of the longest sequence
    causal: bool = False  # a token attends to itself and those before it, and to no later one

    @property
    def tokens(self) -> int:
        """T, the tokens of the whole pack, as a host int."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """S host ints: the first token of each sequence."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    def split(self, most: int) -> "list[Segments]":
        """Return the segments of runs of at most `most` sequences, in order."""
        runs = []
        for first in range(0, len(self.lengths), most):
            bounds = self.cu_seqlens[first : first + most + 1]
            lengths = self.lengths[first : first + most]
            runs.append(Segments(lengths, bounds - bounds[0], self.max_seqlen, self.causal))
        return runs

    @classmethod
    def from_lengths(
        cls,
        lengths: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        causal: bool = False,
    ) -> "Segments":
        """Build the segments of S >= 1 sequences that hold `lengths` tokens each."""
        return cls(lengths, to_device(make_cu_seqlens(lengths), device), max(lengths), causal)

    @classmethod
    def from_grid(
        cls,
        grid_thw: GridLike,
        *,
        patches: int,
        prefix: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Segments":
        """Build the segments of N images; each frame is one sequence.

        `prefix` counts the tokens that stand before every frame's patches (class and register
        tokens), which is why a sequence can be longer than its patches.

        Shapes: grid_thw [N, 3], best on the host -> S = sum of frames.
        Units: `patches` and grid_thw count patches; `lengths` and `max_seqlen` count tokens.
        Raises: ValueError if grid_thw is malformed or does not describe `patches` patches.
        """
        return cls.from_lengths(
            sequence_lengths(read_grid(grid_thw, patches=patches), prefix), device=device
        )


class WindowSegments(NamedTuple):
    """The segments of layers that attend within windows, and which layers do not."""

    segments: Segments
    full: tuple[int, ...]

    @staticmethod
    def of_layer(layer: int, whole: Segments, windows: "WindowSegments | None") -> Segments:
        """Return the segments of a layer, where `whole` are those without windows."""
        return whole if windows is None or layer in windows.full else windows.segments


def make_cu_seqlens(lengths: Sequence[int]) -> Int32[np.ndarray, " boundaries"]:
    """Return where each of S sequences begins, and where the last one ends: [S + 1]."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens
