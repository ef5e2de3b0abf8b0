"""The trunk: a pack's patches to its tokens, before any pooling.

`plan_forward` works on the host, and `run_trunk` on the device, as the papers describe it.
`fast/forward.py` computes the same in less time.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from packvit.config import EncoderConfig
from packvit.model.attention import Backend
from packvit.model.embeddings import PatchEmbeddings, rotary_cos_sin
from packvit.model.layers import Blocks
from packvit.packs.grid import Grid, join_frames, sequence_lengths
from packvit.packs.places import PrefixPlaces, WindowPlaces
from packvit.packs.segments import Segments, WindowSegments


class Trunk(NamedTuple):
    """The parts of an encoder that every patch runs through."""

    config: EncoderConfig
    embeddings: PatchEmbeddings
    blocks: Blocks
    norm: nn.Module


class ForwardPlan(NamedTuple):
    """What the host works out about a pack before the device computes."""

    grid: Grid
    sequences: Grid  # of which each is a frame, or a clip
    lengths: tuple[int, ...]  # tokens of each sequence
    places: PrefixPlaces | None  # of prefix tokens, where there are any
    windows: WindowPlaces | None  # where layers attend within windows
    backend: Backend
    taps: tuple[int, ...]  # layers, counted from the front
    given: Tensor | None  # [T, 3] places of patches, where the caller said them


class TrunkOutput(NamedTuple):
    """The outputs of a trunk: what pooling, projections and mergers read."""

    tokens: Tensor  # [T, D], of the patches
    prefix: Tensor  # [S, R, D]
    taps: dict[int, Tensor]  # [T, D] each
    plan: ForwardPlan


def plan_forward(
    config: EncoderConfig,
    grid: Grid,
    backend: Backend,
    taps: Collection[int],
    device: torch.device,
    given: Tensor | None = None,
) -> ForwardPlan:
    """Return the plan of a forward of the images in `grid`, on `device`."""
    sequences = join_frames(grid) if config.segments == "clip" else grid
    prefix, places, windows = config.prefix, None, None
    if prefix:
        places = PrefixPlaces.from_grid(sequences, prefix, device=device)
    if config.windows:
        windows = WindowPlaces.from_grid(grid, config.windows.side, device=device)
    lengths = sequence_lengths(sequences, prefix)
    return ForwardPlan(grid, sequences, lengths, places, windows, backend, tuple(taps), given)


def run_trunk(trunk: Trunk, values: Tensor, plan: ForwardPlan) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the normed stream, prefix tokens among it, and the stream after each tapped layer.

    Shapes: values [T, P], in the weights' dtype -> [tokens, D], in the order of windows.
    """
    x, *rotary = embed(trunk, values, plan)
    segments = Segments.from_lengths(plan.lengths, device=x.device)
    windows = window_segments(trunk.config, plan, x.device)
    x, tapped = trunk.blocks(x, segments, tuple(rotary) or None, plan.backend, plan.taps, windows)
    return last_norm(trunk, x), tapped


def embed(trunk: Trunk, values: Tensor, plan: ForwardPlan) -> list[Tensor]:
    """Return the embedded stream, and the cosines and sines of rotary positions if there are any.

    Shapes: [T, P] -> [tokens, D], 2 x [tokens, K], in the order of windows.
    """
    x = trunk.embeddings(values, plan.grid, plan.places)
    rows = [x, *(rotary_cos_sin(trunk.config, plan.grid, plan.places, x, plan.given) or ())]
    windows = plan.windows
    return [row.index_select(0, windows.order) for row in rows] if windows else rows


def window_segments(
    config: EncoderConfig, plan: ForwardPlan, device: torch.device
) -> WindowSegments | None:
    """Return the segments of layers that attend within windows, where there are any."""
    if plan.windows is None or config.windows is None:
        return None
    inside = Segments.from_lengths(plan.windows.lengths, device=device)
    return WindowSegments(inside, config.windows.full)


def last_norm(trunk: Trunk, x: Tensor) -> Tensor:
    """Return the stream normed, unless the checkpoint norms the class token alone, or nothing."""
    return trunk.norm(x) if trunk.config.final_norm == "tokens" else x


def trunk_output(x: Tensor, tapped: dict[int, Tensor], plan: ForwardPlan) -> TrunkOutput:
    """Return patches in their own order, and prefix tokens apart from them."""
    if plan.windows is not None:
        x, *rest = (t.index_select(0, plan.windows.back) for t in (x, *tapped.values()))
        tapped = dict(zip(tapped, rest, strict=True))
    places, sequences = plan.places, len(plan.lengths)
    if places is None:
        return TrunkOutput(x, x.new_empty(sequences, 0, x.shape[1]), tapped, plan)
    return TrunkOutput(
        x.index_select(0, places.patches),
        x.index_select(0, places.prefix).unflatten(0, (sequences, -1)),
        {layer: tap.index_select(0, places.patches) for layer, tap in tapped.items()},
        plan,
    )


def token_stream(output: TrunkOutput) -> Tensor:
    """Return prefix tokens and patches of every sequence side by side, as blocks have them."""
    places = output.plan.places
    if places is None:
        return output.tokens
    stream = output.tokens.new_empty(sum(output.plan.lengths), output.tokens.shape[1])
    stream = stream.index_copy(0, places.patches, output.tokens)
    return stream.index_copy(0, places.prefix, output.prefix.flatten(0, 1))
