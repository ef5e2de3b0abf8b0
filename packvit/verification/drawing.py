"""What is compared on: the shapes of images, and what is in them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packvit.config import Table
from packvit.encoder import Encoder
from packvit.images.patches import cut_patches
from packvit.model.embeddings import normalize
from packvit.packs.grid import Grid
from packvit.verification import VerifyOptions

SHAPES: Grid = (  # (frames, rows, columns); square grids alone would hide swapped axes
    (1, 1, 1),
    (1, 1, 23),
    (1, 19, 1),
    (1, 3, 17),
    (1, 17, 3),
    (2, 4, 6),
)
QUICK_SHAPES: Grid = ((1, 1, 1), (1, 1, 7), (1, 5, 1), (1, 3, 17), (2, 4, 6))
LARGEST = (1, 64, 64)
SQUARE = 16  # of encoders that know no size of their own
# Of each shape there are images enough for as many tokens, so that two equal implementations have
# equal root mean squares; of small ones no more than MOST, of large ones no fewer than LEAST.
TOKENS, LEAST, MOST = 256, 2, 16
QUICK_MOST = 4


@dataclass(frozen=True, slots=True)
class Shapes:
    """The images of one round, and whether their positions are interpolated on request."""

    grid: Grid  # images of one shape stand side by side
    interpolate: bool

    def groups(self) -> Iterator[range]:
        """Yield which images are of one shape, shape after shape."""
        start = 0
        for place in dict.fromkeys(self.grid):
            yield range(start, start := start + self.grid.count(place))


def plan_shapes(encoder: Encoder, options: VerifyOptions, interpolates: bool) -> list[Shapes]:
    """Return the rounds: any grid, or an encoder's one grid and, on request, any other."""
    table = encoder.config.positions
    rows, columns = (table.rows, table.columns) if isinstance(table, Table) else (SQUARE, SQUARE)
    own, most = (1, rows, columns), QUICK_MOST if options.quick else MOST
    others = QUICK_SHAPES if options.quick else (*SHAPES, LARGEST)
    side = encoder.images.multiple
    own, others = in_squares(own, side), tuple(in_squares(place, side) for place in others)
    if isinstance(table, Table) and table.frames:
        others = tuple(place for place in others if place[0] <= table.frames)
    if not isinstance(table, Table) or table.any_grid:
        return [Shapes(repeated((*others, own), most), interpolate=False)]
    alone = (*repeated((own,), most), own, own, *repeated(((2, rows, columns),), most))
    rounds = [Shapes(alone, interpolate=False)]
    return (
        [*rounds, Shapes(repeated(tuple(others), most), interpolate=True)]
        if interpolates
        else rounds
    )


def in_squares(place: tuple[int, int, int], side: int) -> tuple[int, int, int]:
    """Return a shape whose sides are multiples of a merger's: multiplied, except for the largest.

    So 1 x 23 patches become 2 x 46.
    """
    frames, rows, columns = place
    if rows % side or columns % side or place != LARGEST:
        return frames, rows * side, columns * side
    return place


def repeated(places: Grid, most: int = MOST) -> Grid:
    """Return each shape as often as it is drawn: the largest, which takes the longest, once."""
    return tuple(
        place
        for place in dict.fromkeys(places)
        for _ in range(1 if place == LARGEST else min(most, max(LEAST, TOKENS // math.prod(place))))
    )


def draw(grid: Grid, encoder: Encoder, seed: int) -> list[Tensor]:
    """Return normalised patches, of N(0, 1) and of something like photographs by turns.

    Shapes: N x [patches, P], (row, column, channel).
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = np.random.default_rng(seed)
    drawn = []
    for image, (frames, rows, columns) in enumerate(grid):
        if image % 2:
            drawn.append(draw_pixels(pictures, encoder, frames, rows, columns))
            continue
        shape = (frames * rows * columns, encoder.config.patch_dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        drawn.append(noise.to(encoder.device))
    return drawn


def draw_pixels(
    draw: np.random.Generator, encoder: Encoder, frames: int, rows: int, columns: int
) -> Tensor:
    """Return the normalised patches of frames like photographs. Shapes: [patches, P]."""
    side, images = encoder.config.patch, encoder.images
    cut = [
        cut_patches(np.asarray(draw_photograph(draw, rows * side, columns * side)), side)
        for _ in range(frames)
    ]
    pixels = torch.from_numpy(np.concatenate(cut)).to(encoder.device)
    return normalize(pixels, images.mean, images.std, channels_last=True)


def draw_photograph(draw: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return something like a photograph: large soft shapes, and grain."""
    soft = Image.fromarray(draw.integers(0, 256, (7, 9, 3), np.uint8))
    large = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = draw.integers(-20, 21, (height, width, 3), np.int16)
    return Image.fromarray((large + grain).clip(0, 255).astype(np.uint8))


def describe_grid(grid: Sequence[tuple[int, int, int]], shapes: Shapes) -> str:
    """Say which images were compared: 3 x 17, 2 frames of 4 x 6, 8 images."""
    frames, rows, columns = grid[0]
    sides = f"{rows} x {columns}" if frames == 1 else f"{frames} frames of {rows} x {columns}"
    said = sides if len(set(grid)) == 1 else f"{len(grid)} images"
    return f"{said}, interpolated" if shapes.interpolate else said
