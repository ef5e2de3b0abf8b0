"""Neighbouring patches of one image merged into one token, with the merged grid and segments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from packvit.config import EncoderConfig, Merger
from packvit.model.activations import activate
from packvit.model.linear import Linear
from packvit.model.norms import Tokens, norm_of
from packvit.packs.grid import Grid, read_grid, sequence_lengths, to_device
from packvit.packs.places import ClipPlaces, PatchPlaces
from packvit.packs.segments import Segments


@dataclass(frozen=True, eq=False)
class Merging:
    """Which patches each of M merged tokens is made of, and where merged tokens stand.

    A side that `side` does not divide is filled by repeating its last row or column, so a merged
    token holds patches of one frame of one image and nothing else.
    """

    members: Int64[Tensor, "M members"]  # raster order within the square, on the tokens' device
    grid_thw: Int64[Tensor, "N 3"]  # of the merged tokens, on the host
    segments: Segments  # of the merged tokens: every frame is one sequence

    @classmethod
    def from_grid(
        cls,
        grid_thw: Tensor,
        *,
        patches: int,
        side: int = 2,
        device: torch.device | str = "cpu",
    ) -> "Merging":
        """Plan squares of `side` x `side` patches, without a loop over images.

        Shapes: grid_thw [N, 3], best on the host -> M = sum of frames * ceil(rows / side) *
        ceil(columns / side).
        Raises: ValueError if grid_thw is malformed or does not describe `patches` patches, or for a
        side below 1.
        """
        if side < 1:
            raise ValueError(f"side is {side}, but a merged token holds at least 1 x 1 patches.")
        return cls.of_images(read_grid(grid_thw, patches=patches), side=side, device=device)

    @classmethod
    def of_images(cls, grid: Grid, *, side: int, device: torch.device | str) -> "Merging":
        """Plan squares, as `from_grid`, of a grid that was read before."""
        merged: Grid = tuple(
            (t, -(-rows // side), -(-columns // side)) for t, rows, columns in grid
        )
        places, lengths = PatchPlaces.from_grid(merged, device=device), sequence_lengths(merged)
        frames = np.repeat(np.asarray(grid), [t for t, _, _ in grid], axis=0)  # [S, 3]
        sizes = frames[:, 1] * frames[:, 2]
        table = to_device(np.stack([sizes.cumsum() - sizes, frames[:, 1], frames[:, 2]]), device)
        first, rows, columns = table.index_select(1, places.sequence).unsqueeze(2)  # each [M, 1]
        corner = torch.arange(side * side, dtype=torch.int64, device=device)
        down, right = corner.div(side, rounding_mode="floor"), corner % side
        row = torch.minimum(places.row.unsqueeze(1) * side + down, rows - 1)
        column = torch.minimum(places.column.unsqueeze(1) * side + right, columns - 1)
        members = first + row * columns + column
        segments = Segments.from_lengths(lengths, device=device)
        return cls(members, torch.tensor(merged, dtype=torch.int64, device="cpu"), segments)

    def merge(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "M square"]:
        """Lay the tokens of every square side by side: top left, top right, ..., bottom right."""
        return tokens.index_select(0, self.members.flatten()).view(len(self.members), -1)


class PatchMerger(nn.Module):
    """Squares of patches to a language model's tokens: a norm and an MLP with GELU."""

    invariant: bool = False  # see `model/linear.py`

    def __init__(self, merger: Merger, width: int, *, norms_squares: bool) -> None:
        super().__init__()
        square = width * merger.side**2
        self.norms_squares = norms_squares
        self.norm = norm_of(merger.norm, square if norms_squares else width, merger.norm_eps)
        self.up = Linear(square, square)
        self.down = Linear(square, merger.width)

    def forward(self, tokens: Tokens, merging: Merging) -> Float[Tensor, "M L"]:
        """Merge squares, normed as a whole or patch by patch."""
        if self.norms_squares:
            squares = self.norm(merging.merge(tokens))
        else:
            squares = merging.merge(self.norm(tokens))
        return self.down(activate(self.up(squares), "gelu", self.invariant))


class Merged(NamedTuple):
    """The tokens that a language model takes."""

    merged: Float[Tensor, "M L"]
    deepstack: dict[int, Float[Tensor, "M L"]]  # by the layer whose output was merged
    lengths: tuple[int, ...]  # merged tokens of each sequence


class Mergers(nn.Module):
    """The merger of a checkpoint, and those of its deepstack.

    Where it attends over clips, it merges the mean over a clip's frames, and has no deepstack.
    """

    def __init__(self, config: EncoderConfig, merger: Merger) -> None:
        super().__init__()
        self.side, self.layers = merger.side, merger.deepstack
        self.clips = config.segments == "clip"
        self.last = PatchMerger(merger, config.width, norms_squares=False)
        self.deepstack = nn.ModuleList(
            PatchMerger(merger, config.width, norms_squares=True) for _ in merger.deepstack
        )

    def forward(self, tokens: Tokens, taps: Mapping[int, Tokens], grid: Grid) -> Merged:
        """Merge the last layer's tokens, and of `taps` those of the deepstack's layers.

        Raises: ValueError naming the first image that does not divide into squares.
        """
        check_squares(grid, self.side)
        if self.clips and any(frames > 1 for frames, _, _ in grid):
            tokens = mean_over_frames(tokens, grid)
        if self.clips:
            grid = tuple((1, rows, columns) for _, rows, columns in grid)
        merging = Merging.of_images(grid, side=self.side, device=tokens.device)
        deep = dict(zip(self.layers, self.deepstack, strict=True))
        return Merged(
            self.last(tokens, merging),
            {layer: deep[layer](taps[layer], merging) for layer in sorted(deep)},
            merging.segments.lengths,
        )


def mean_over_frames(tokens: Tokens, grid: Grid) -> Float[Tensor, "places D"]:
    """Return each place of a clip as the mean over its frames, in one call, summed in order."""
    clips = ClipPlaces.from_grid(grid, device=tokens.device)
    ordered = tokens.index_select(0, clips.order).to(
        torch.promote_types(tokens.dtype, torch.float32)
    )
    means = torch.segment_reduce(ordered, "mean", lengths=clips.frames, unsafe=True)
    return means.to(tokens.dtype)


def check_squares(grid: Grid, side: int) -> None:
    """Refuse images that do not divide into squares of patches.

    Raises: ValueError naming the first one.
    """
    for image, (_, rows, columns) in enumerate(grid):
        if rows % side or columns % side:
            raise ValueError(
                f"Image {image} is {rows} x {columns} patches, but this checkpoint merges squares "
                f"of {side} x {side}, so rows and columns must be multiples of {side}. "
                "`encoder.pack(images)` resizes them so."
            )
