"""A trunk's forward in fewer launches and fewer passes over memory, where that applies."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from packvit.config import SinCos
from packvit.fast.blocks import choose_blocks
from packvit.fast.graphs import Graphs
from packvit.fast.int8 import to_int8
from packvit.model.layers import Blocks
from packvit.model.memory import peak
from packvit.model.positions import sine_cosine
from packvit.model.trunk import ForwardPlan, Trunk, embed, last_norm, window_segments
from packvit.packs.grid import frame_table, to_device
from packvit.packs.places import PatchPlaces
from packvit.packs.segments import Segments

AnyFast = TypeVar("AnyFast", bound="FastForward")


class FastForward(nn.Module):
    """What makes an encoder faster: fused blocks, CUDA graphs, matrices in int8.

    It is a module without weights, so that torch tells it when its encoder is moved, cast, loaded
    or trained, which is when graphs must be forgotten: they read weights where they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graphs: Graphs | None = Graphs()  # None: none are made

    def forward(
        self, owner: nn.Module, trunk: Trunk, values: Tensor, plan: ForwardPlan
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what `run_trunk` returns, to rounding; `owner` is the encoder of the trunk."""
        if not values.is_cuda:
            segments = Segments.from_lengths(plan.lengths, device=values.device)
            return compute(trunk, plan, None, embed(trunk, values, plan), None, segments)
        rows, table, axis = embed_or_wait(trunk, values, plan)
        work = partial(compute, trunk, plan, axis)
        # Graphs fill up one set of segments, and windows would be a second one.
        graphs = None if self.training or plan.windows else self.graphs
        if graphs is not None and graphs.serve(rows[0], plan.backend):
            return graphs(
                work,
                rows,
                table,
                plan.lengths,
                plan.backend,
                plan.taps,
                owner=owner,
                invariant=trunk.blocks.invariant,
                held=axis,
                peak=peak(trunk.config, values.dtype.itemsize, taps=len(plan.taps)),
            )
        frames = None if table is None else to_device(table, values.device)
        return work(rows, frames, Segments.from_lengths(plan.lengths, device=values.device))

    def to_int8(self, owner: nn.Module, blocks: Blocks) -> None:
        """Put the matrices of an encoder's blocks in int8, for good and for inference alone.

        Raises: ValueError where int8 cannot run.
        """
        to_int8(blocks)
        owner.requires_grad_(False)

    def forget(self) -> None:
        """Free the memory of the graphs."""
        if self.graphs is not None:
            self.graphs.forget()

    def train(self: AnyFast, mode: bool = True) -> AnyFast:
        """Training replays no graphs."""
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self: AnyFast, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnyFast:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **named)


def embed_or_wait(
    trunk: Trunk, values: Tensor, plan: ForwardPlan
) -> tuple[list[Tensor], np.ndarray | None, Tensor | None]:
    """Return rows, and the table of frames and the axis where `compute` embeds them by those.

    Sine-cosine positions are computed from little on the device, so that a graph can do that.
    """
    config = trunk.config
    sines = isinstance(config.positions, SinCos) and not config.rotary
    if sines and plan.places is None and plan.windows is None:
        return [values], frame_table(plan.grid), trunk.embeddings.axis(plan.grid)
    return embed(trunk, values, plan), None, None


def compute(
    trunk: Trunk,
    plan: ForwardPlan,
    axis: Tensor | None,
    rows: Sequence[Tensor],
    table: Tensor | None,
    segments: Segments,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the normed stream, and taps: all that a CUDA graph holds.

    `rows` are patches, where `axis` and `table` tell their places, or else what `embed` returns.
    """
    x, *rotary = rows
    if axis is not None and table is not None:
        sines = sine_cosine(axis, PatchPlaces.from_table(table, len(x)))
        x = trunk.embeddings(x, plan.grid, None, sines)
    run = choose_blocks(trunk.blocks, x)
    windows = window_segments(trunk.config, plan, x.device)
    x, tapped = run(x, segments, tuple(rotary) or None, plan.backend, plan.taps, windows)
    return last_norm(trunk, x), tapped
