"""Where each patch of a pack stands in its image, and prefix tokens among the patches."""

from dataclasses import dataclass

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
