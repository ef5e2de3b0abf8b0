"""Where each sequence of a pack begins and ends, and where each patch stands in its image.

Both are computed once per pack, on the host, by the encoder's public methods, and passed down as
arguments. Kernels read the tensors on the device, Python reads the host's numbers, and no forward
pass waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

Grid = tuple[tuple[int, int, int], ...]  # (frames, rows, columns) of each image, in patches

ROW_MEANING = "Each row of grid_thw is (frames, rows, columns) counted in patches, not pixels."


def to_device(numbers: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy host numbers to `device` without waiting for it.

    Only for small arrays: from memory that is not pinned, CUDA copies more than 64 KiB only after
    all earlier work, and pinning takes longer than copying.
    """
    return torch.from_numpy(numbers).to(device, non_blocking=True)


@dataclass(eq=False)
class Segments:
    """The varlen arguments of T packed tokens that form S sequences; never changed once built.

    Not a frozen dataclass: torch 2.11 guards on every field of one, and would recompile for each
    number of sequences.
    """

    lengths: tuple[int, ...]  # S host ints: tokens per sequence
    cu_seqlens: Int32[Tensor, " boundaries"]  # [S + 1] on the tokens' device, from 0 up to T
    max_seqlen: int  # host int: tokens of the longest sequence

    @property
    def tokens(self) -> int:
        """T, the tokens of the whole pack, as a host int."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """S host ints: the first token of each sequence."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    @classmethod
    def from_lengths(
        cls, lengths: tuple[int, ...], *, device: torch.device | str = "cpu"
    ) -> "Segments":
        """Build the segments of S >= 1 sequences that hold `lengths` tokens each."""
        return cls(lengths, to_device(make_cu_seqlens(lengths), device), max(lengths))

    @classmethod
    def from_grid(
        cls,
        grid_thw: Tensor,
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


def make_cu_seqlens(lengths: Sequence[int]) -> Int32[np.ndarray, " boundaries"]:
    """Return where each of S sequences begins, and where the last one ends: [S + 1]."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return cu_seqlens


def read_grid(grid_thw: Tensor, *, patches: int) -> Grid:
    """Check `grid_thw` against the number of patches and return its rows as host ints.

    On the host this is free; a grid on a device is copied once, and the host waits for it.

    Shapes: grid_thw [N, 3], any integer dtype, N >= 1.
    Raises: ValueError naming the first row that cannot be an image, or both sums of patches.
    """
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or len(grid_thw) == 0:
        raise ValueError(
            f"grid_thw must be [num_images, 3] with at least one image, "
            f"not {list(grid_thw.shape)}. {ROW_MEANING}"
        )
    if grid_thw.is_floating_point() or grid_thw.is_complex() or grid_thw.dtype == torch.bool:
        raise ValueError(f"grid_thw must hold integers, not {grid_thw.dtype}. {ROW_MEANING}")
    grid = tuple((frames, rows, columns) for frames, rows, columns in grid_thw.tolist())
    for image, row in enumerate(grid):
        if min(row) < 1:
            raise ValueError(f"grid_thw[{image}] is {row}; every count is 1 or more. {ROW_MEANING}")
    described = sum(frames * rows * columns for frames, rows, columns in grid)
    if described != patches:
        raise ValueError(
            f"hidden_states holds {patches} patches, but grid_thw describes {described} "
            f"({len(grid)} images). {ROW_MEANING}"
        )
    return grid


def sequence_lengths(grid: Grid, prefix: int = 0) -> tuple[int, ...]:
    """Return the tokens of each frame of each image: S host ints."""
    return tuple(prefix + rows * columns for frames, rows, columns in grid for _ in range(frames))


def segment_images(grid: Grid) -> Int64[np.ndarray, " S"]:
    """Return the image of each sequence, on the host."""
    return np.repeat(np.arange(len(grid)), [frames for frames, _, _ in grid])


def frame_table(grid: Grid) -> Int64[np.ndarray, "3 S"]:
    """Return the rows and columns of each frame, and its first patch, on the host."""
    sides = np.asarray(grid, dtype=np.int64)
    rows, columns = np.repeat(sides[:, 1:], sides[:, 0], axis=0).T
    sizes = rows * columns
    return np.array([rows, columns, sizes.cumsum() - sizes])


@dataclass(frozen=True, eq=False)
class PatchPlaces:
    """The place of each of T patches in its frame, on the device."""

    row: Int64[Tensor, " T"]
    column: Int64[Tensor, " T"]
    rows: Int64[Tensor, " T"]  # of the patch's frame
    columns: Int64[Tensor, " T"]
    sequence: Int64[Tensor, " T"]  # index of the patch's frame in the pack

    @classmethod
    def from_grid(cls, grid: Grid, *, device: torch.device | str = "cpu") -> "PatchPlaces":
        """Return the places of all patches in raster order, without a loop over images."""
        table = frame_table(grid)
        patches = int((table[0] * table[1]).sum())
        return cls.from_table(to_device(table, device), patches)

    @classmethod
    def from_table(cls, table: Int64[Tensor, "3 S"], patches: int) -> "PatchPlaces":
        """Compute the places on the device; `patches` is given, so no sync is needed."""
        tall, wide, _ = table.unbind()
        sequence = torch.repeat_interleave(tall * wide, output_size=patches)
        rows, columns, start = table.index_select(1, sequence).unbind()
        within = torch.arange(patches, dtype=torch.int64, device=table.device) - start
        row = within.div(columns, rounding_mode="floor")
        return cls(row, within - row * columns, rows, columns, sequence)


@dataclass(frozen=True, eq=False)
class PrefixPlaces:
    """The indices of prefix tokens and patches in a pack with R prefix tokens a sequence.

    `gather` builds the token stream from the R prefix tokens followed by all T patches; `prefix`
    and `patches` split it again.
    """

    gather: Int64[Tensor, " tokens"]
    prefix: Int64[Tensor, " prefixes"]  # S * R
    patches: Int64[Tensor, " T"]

    @classmethod
    def from_grid(cls, grid: Grid, prefix: int, *, device: torch.device | str) -> "PrefixPlaces":
        """Compute all three on the device, without a loop over images."""
        host = frame_table(grid)
        sizes, frames = host[0] * host[1], host.shape[1]
        total, offsets = int(sizes.sum()), np.arange(frames) * prefix
        sent = np.array([sizes, offsets + prefix, host[2] + offsets])
        counts, shifts, heads = to_device(sent, device).unbind()
        patch = torch.arange(total, dtype=torch.int64, device=device)
        patches = patch + torch.repeat_interleave(shifts, counts, output_size=total)
        each = torch.arange(prefix, dtype=torch.int64, device=device)
        prefixes = (heads[:, None] + each).flatten()
        gather = patch.new_empty(total + frames * prefix)
        gather.index_copy_(0, patches, patch + prefix)
        gather.index_copy_(0, prefixes, each.repeat(frames))
        return cls(gather, prefixes, patches)
