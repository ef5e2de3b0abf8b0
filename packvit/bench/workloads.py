"""The grids of each workload, and the operations that an encoder needs for them."""

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

from packvit.bench import SEED, WORKLOADS
from packvit.config import EncoderConfig
from packvit.packs.grid import Grid, join_frames, sequence_lengths
from packvit.packs.places import window_lengths


@dataclass(frozen=True, slots=True)
class Workload:
    """One pack to benchmark."""

    name: str
    title: str
    grid: Grid
    scaled_down: bool  # smaller than the workload of that name on a GPU

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return sequence_lengths(self.grid)


def mixed_sizes(images: int, fewest: int, most: int, *, seed: int = SEED) -> Grid:
    """Draw images of `fewest` to `most` patches at aspect ratios of 0.5 to 2."""
    draw = random.Random(seed)
    grid: list[tuple[int, int, int]] = []
    while len(grid) < images:
        area, aspect = draw.uniform(fewest, most), 2 ** draw.uniform(-1, 1)
        rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if fewest <= rows * columns <= most:
            grid.append((1, rows, columns))
    return tuple(grid)


def workload(name: str, *, small: bool) -> Workload:
    """Return a workload by its name; `small` takes two cores about a second."""
    full = {
        "mixed": lambda: mixed_sizes(52, 240, 1008),  # 33,739 patches
        "tiny-images": lambda: mixed_sizes(2048, 4, 16),
        "large": lambda: mixed_sizes(8, 1024, 16_384),
        "huge": lambda: ((1, 128, 128),),
        "equal": lambda: ((1, 16, 16),) * 64,
        "small": lambda: ((1, 16, 16),) * 8,
    }
    reduced = {
        "mixed": lambda: mixed_sizes(12, 16, 144),
        "tiny-images": lambda: mixed_sizes(64, 4, 16),
        "large": lambda: mixed_sizes(3, 256, 1024),
        "huge": lambda: ((1, 24, 32),),
        "equal": lambda: ((1, 16, 8),) * 8,
        "small": lambda: ((1, 8, 8),) * 4,
    }
    return Workload(name, WORKLOADS[name], (reduced if small else full)[name](), small)


def on_own_grid(work: Workload, rows: int, columns: int) -> Workload:
    """Return a workload of about as many patches, for an encoder that takes one grid only."""
    images = max(1, round(sum(work.lengths) / (rows * columns)))
    title = f"{work.title}, each at the checkpoint's own {rows} x {columns} patches"
    return replace(work, title=title, grid=((1, rows, columns),) * images)


def in_squares(work: Workload, side: int) -> Workload:
    """Return a workload whose sides are multiples of `side`: rounded down, but to no less."""
    grid = tuple(
        (frames, *(max(side, patches - patches % side) for patches in sides))
        for frames, *sides in work.grid
    )
    return replace(work, grid=grid)


class Flops(NamedTuple):
    """Floating-point operations of one pass: two for every multiplication and addition."""

    forward: float
    backward: float  # gradients of all weights, none of the patches, nothing recomputed


def encoder_flops(config: EncoderConfig, grid: Grid) -> Flops:
    """Return the operations of an encoder's matmuls and attention, without the pooling head."""
    sequences = join_frames(grid) if config.segments == "clip" else grid
    lengths = sequence_lengths(sequences, config.prefix)
    patches = sum(sequence_lengths(grid))
    width, matrices = config.width, 3 if config.gated else 2
    embedding = 2.0 * patches * config.patch_dim * width
    linear = 2.0 * sum(lengths) * (4 * width**2 + matrices * width * config.mlp_width)
    attention = config.layers * sum(length**2 for length in lengths)
    if windows := config.windows:
        whole = len([layer for layer in windows.full if layer < config.layers])
        inside = sum(length**2 for length in window_lengths(grid, windows.side))
        attention = whole * attention // config.layers + (config.layers - whole) * inside
    blocks = config.layers * linear + 4.0 * width * attention
    return Flops(embedding + blocks, embedding + 2 * blocks)
