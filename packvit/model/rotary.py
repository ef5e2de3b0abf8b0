"""Rotary positions: queries and keys are rotated by the positions of their patches."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from packvit.config import AxialRotary, Rotary, VideoRotary
from packvit.packs.places import PatchPlaces


def rotary(
    positions: Rotary, places: PatchPlaces, head_dim: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Return cosine and sine of every patch's angles: [y | x | y | x], a quarter of K each.

    A patch's coordinate is that of its centre, from -1 to 1 over each side of its own image, so
    one formula serves all images of a pack. Angles are fp32, rounded once at the end.

    Source: DINOv3 in transformers 5.17, models/dinov3_vit.
    """
    place = torch.stack([places.row, places.column], 1).float() + 0.5
    coordinates = 2 * (place / torch.stack([places.rows, places.columns], 1)) - 1
    octave = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=place.device)
    angles = 2 * math.pi * coordinates[:, :, None] * (1 / positions.base**octave)
    angles = angles.flatten(1).tile(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def axial_rotary(
    positions: AxialRotary, places: PatchPlaces, head_dim: int
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Return cosine and sine of every patch's angles, twice K/2 of them, in fp32.

    In lower precision rows and columns beyond some hundred would be taken for one another.

    Source: Qwen3-VL in transformers 5.17, models/qwen3_vl, whose frequencies are fp32 too.
    """
    half = head_dim // 2
    octave = torch.arange(0, half, 2, dtype=torch.float32, device=places.row.device) / half
    frequencies = 1.0 / positions.base**octave
    axes = (places.row, places.column)
    axes = axes if positions.order == "row_column" else axes[::-1]
    angles = [(axis + positions.offset).float().outer(frequencies) for axis in axes]
    inner = torch.stack(angles, 2 if positions.layout == "interleaved" else 1)
    whole = inner.flatten(1).tile(2)
    return whole.cos(), whole.sin()


def video_rotary(
    positions: VideoRotary, places: Int64[Tensor, "T 3"], head_dim: int
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Return cosine and sine of every patch's angles, in fp32: even ones first, then odd ones.

    [time | row | column] goes over a head twice, whose neighbours are turned together: so each of
    the two has an angle of its own. Ours turn k and k + K/2, so these are ordered as weights are.

    Source: OneVision-Encoder c2cd3e0, `VideoRotaryEmbeddingSplit466` and `rotate_half`.
    """
    unit = head_dim // 32
    angles = []
    for place, count in zip(places.float().unbind(1), (4 * unit, 6 * unit, 6 * unit), strict=True):
        octave = torch.arange(count, dtype=torch.float32, device=place.device) / count
        angles.append(place.outer(1.0 / positions.base**octave))
    inner = torch.cat(angles, 1)
    whole = inner.unflatten(1, (-1, 2)).transpose(1, 2).tile(2).flatten(1)
    return whole.cos(), whole.sin()


def rotate(
    heads: Float[Tensor, "T H K"], cosine: Float[Tensor, "T K"], sine: Float[Tensor, "T K"]
) -> Float[Tensor, "T H K"]:
    """Turn each pair (k, k + K/2) of every head by the token's angles."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], -1)
    return heads * cosine.unsqueeze(1) + turned * sine.unsqueeze(1)
