"""The trunk: a pack's patches to its tokens, before any pooling.

`plan_forward` is the host's part, and `run_trunk` the device's, as the papers have it. What gives
the same in less time is `fast/forward.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packvit.config import EncoderConfig
from packvit.model.attention import Backend
from packvit.model.embeddings import PatchEmbeddings, rotary_cos_sin
from packvit.model.layers import Blocks
from packvit.model.norms import Norm
from packvit.packs.grid import Grid, sequence_lengths
from packvit.packs.places import PrefixPlaces
from packvit.packs.segments import Segments


class Trunk(NamedTuple):
    """The parts of an encoder that every patch runs through."""

    config: EncoderConfig
    embeddings: PatchEmbeddings
    blocks: Blocks
    norm: Norm


class ForwardPlan(NamedTuple):
    """What the host works out about a pack before the device computes."""

    grid: Grid
    places: PrefixPlaces | None  # of prefix tokens, where there are any
    lengths: tuple[int, ...]  # tokens of each sequence
    backend: Backend
    taps: tuple[int, ...]  # layers, counted from the front


class TrunkOutput(NamedTuple):
    """What a trunk makes of a pack: what pooling, projections and mergers read."""

    tokens: Tensor  # [T, D], of the patches
    prefix: Tensor  # [S, R, D]
    taps: dict[int, Tensor]  # [T, D] each
    plan: ForwardPlan


def plan_forward(
    config: EncoderConfig,
    grid: Grid,
    backend: Backend,
    taps: Sequence[int],
    device: torch.device,
) -> ForwardPlan:
    """Return the plan of a forward of the images in `grid`, on `device`."""
    prefix = config.prefix
    places = PrefixPlaces.from_grid(grid, prefix, device=device) if prefix else None
    return ForwardPlan(grid, places, sequence_lengths(grid, prefix), backend, tuple(taps))


def run_trunk(trunk: Trunk, values: Tensor, plan: ForwardPlan) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the normed stream, prefix tokens among it, and the stream after each tapped layer.

    Shapes: values [T, P], in the weights' dtype -> [tokens, D].
    """
    x = trunk.embeddings(values, plan.grid, plan.places)
    rotary = rotary_cos_sin(trunk.config, plan.grid, plan.places, x)
    segments = Segments.from_lengths(plan.lengths, device=x.device)
    x, tapped = trunk.blocks(x, segments, rotary, plan.backend, plan.taps)
    return last_norm(trunk, x), tapped


def last_norm(trunk: Trunk, x: Tensor) -> Tensor:
    """Return the stream normed, unless the checkpoint norms the class token alone."""
    return trunk.norm(x) if trunk.config.final_norm == "tokens" else x


def part_prefix(x: Tensor, tapped: dict[int, Tensor], plan: ForwardPlan) -> TrunkOutput:
    """Return patch tokens and prefix tokens apart."""
    places, sequences = plan.places, len(plan.lengths)
    if places is None:
        return TrunkOutput(x, x.new_empty(sequences, 0, x.shape[1]), tapped, plan)
    return TrunkOutput(
        x.index_select(0, places.patches),
        x.index_select(0, places.prefix).unflatten(0, (sequences, -1)),
        {layer: tap.index_select(0, places.patches) for layer, tap in tapped.items()},
        plan,
    )
