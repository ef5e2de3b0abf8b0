"""Where each patch of a pack stands in its image, and prefix tokens among the patches."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from packvit.packs.grid import Grid, frame_table, to_device


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


@dataclass(frozen=True, eq=False)
class WindowPlaces:
    """The order of a pack's patches in which those of a window stand together.

    Windows of a frame stand in raster order, and so do the patches of a window. A frame's patches
    stay where its patches were, so that both are sequences.
    """

    order: Int64[Tensor, " T"]  # `index_select` by it goes into windows
    back: Int64[Tensor, " T"]  # and by this comes back
    lengths: tuple[int, ...]  # patches of each window, host ints

    @classmethod
    def from_grid(cls, grid: Grid, side: int, *, device: torch.device | str) -> "WindowPlaces":
        """Plan windows of `side` x `side` patches, cut from the top left of every frame."""
        places = PatchPlaces.from_grid(grid, device=device)
        table = frame_table(grid)
        start = to_device(table[2], device).index_select(0, places.sequence)
        top = places.row.div(side, rounding_mode="floor") * side
        left = places.column.div(side, rounding_mode="floor") * side
        tall, wide = (places.rows - top).clamp(max=side), (places.columns - left).clamp(max=side)
        within = (places.row - top) * wide + places.column - left
        back = start + top * places.columns + tall * left + within
        patch = torch.arange(len(back), dtype=torch.int64, device=device)
        order = torch.empty_like(back).index_copy_(0, back, patch)
        return cls(order, back, window_lengths(grid, side))


@dataclass(frozen=True, eq=False)
class ClipPlaces:
    """Each place of a clip in all of its frames: `order` lays them side by side, frame by frame."""

    order: Int64[Tensor, " T"]
    frames: Int64[Tensor, " places"]  # how many stand there, for each place of each clip

    @classmethod
    def from_grid(cls, grid: Grid, *, device: torch.device | str) -> "ClipPlaces":
        """Compute both on the device, without a loop over clips."""
        frames, rows, columns = np.asarray(grid, dtype=np.int64).T
        sizes = rows * columns
        totals = frames * sizes
        host = np.array([frames, sizes, totals.cumsum() - totals, totals])
        counts, places, starts, both = to_device(host, device).unbind()
        total, distinct = int(totals.sum()), int(sizes.sum())
        clip = torch.repeat_interleave(both, output_size=total)
        count, size, start = (part.index_select(0, clip) for part in (counts, places, starts))
        within = torch.arange(total, dtype=torch.int64, device=device) - start
        place = within.div(count, rounding_mode="floor")
        order = start + (within - place * count) * size + place
        return cls(order, torch.repeat_interleave(counts, places, output_size=distinct))


def places_in_clips(
    grid: Grid, frames: int | None, *, device: torch.device | str = "cpu"
) -> Int64[Tensor, "T 3"]:
    """Return (time, row, column) of every patch, where clips are spread over `frames` times."""
    places = PatchPlaces.from_grid(grid, device=device)
    times = [time for count, _, _ in grid for time in frame_times(count, frames)]
    time = to_device(np.array(times), device).index_select(0, places.sequence)
    return torch.stack([time, places.row, places.column], 1)


@lru_cache(maxsize=256)
def frame_times(count: int, frames: int | None) -> tuple[int, ...]:
    """Return the times of a clip's frames: the first at 0 and the last at `frames` - 1.

    Source: OneVision-Encoder c2cd3e0, README.md: in fp32, cut to whole numbers.
    """
    if frames is None:
        return tuple(range(count))
    spread = torch.linspace(0, frames - 1, count, dtype=torch.float32, device="cpu")
    return tuple(spread.long().tolist())


def window_lengths(grid: Grid, side: int) -> tuple[int, ...]:
    """Return the patches of each window of each frame, on the host."""
    lengths: list[int] = []
    for frames, rows, columns in grid:
        tall, wide = (
            [min(side, total - first) for first in range(0, total, side)]
            for total in (rows, columns)
        )
        lengths += [height * width for height in tall for width in wide] * frames
    return tuple(lengths)
