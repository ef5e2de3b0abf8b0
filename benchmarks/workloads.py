"""What is run: packs of mixed sizes, drawn from a seed, and images cut into patches."""

import random

import torch
from torch import Tensor

Grid = list[tuple[int, int, int]]


def mixed_sizes(images: int, fewest: int, most: int, *, seed: int) -> Grid:
    """Draw images of `fewest` to `most` patches at aspect ratios of 0.5 to 2."""
    draw = random.Random(seed)
    grid: Grid = []
    while len(grid) < images:
        area, aspect = draw.uniform(fewest, most), 2 ** draw.uniform(-1, 1)
        rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if fewest <= rows * columns <= most:
            grid.append((1, rows, columns))
    return grid


def transformer_flops(
    grid: Grid, *, width: int, layers: int, matrices: int, mlp_width: int, patch_dim: int
) -> float:
    """Return an encoder's floating-point operations: two for every multiplication and addition.

    `matrices` counts those of an MLP: 3 where it is gated, else 2.
    """
    lengths = [rows * columns for _, rows, columns in grid]
    linear = 4 * width**2 + matrices * width * mlp_width
    attention = sum(2 * length**2 * width for length in lengths)
    return 2.0 * (sum(lengths) * (patch_dim * width + layers * linear) + layers * attention)


def flatten(image: Tensor, side: int) -> Tensor:
    """Cut [1, 3, H, W] into patches [T, P], each (row, column, channel)."""
    tiles = image[0].unflatten(1, (-1, side)).unflatten(3, (-1, side))
    return tiles.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def pad(patches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad images to the longest. Shapes: N x [patches, P] -> [N, L, P], and what is real [N, L]."""
    padded = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
    real = torch.zeros(padded.shape[:2], dtype=torch.bool, device=padded.device)
    for row, one in zip(real, patches, strict=True):
        row[: len(one)] = True
    return padded, real
