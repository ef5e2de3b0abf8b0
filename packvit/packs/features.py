"""The input of an encoder's forward, and the outputs of `encode`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packvit.images.decode import Source, load_image
from packvit.images.errors import ImageError
from packvit.images.patches import Cutting, Patches
from packvit.packs.clips import Clip, cut_clip, frames_of, of_one_width
from packvit.packs.grid import Grid, GridLike, as_tensor, to_device


class Pack(NamedTuple):
    """What one forward takes: `encoder(pack)`, `encoder(*pack)` and `encoder.encode(pack)`.

    Shapes: hidden_states [T, P] uint8 on the encoder's device; grid_thw [N, 3] int64 on the host.
    """

    hidden_states: Tensor
    grid_thw: Tensor

    def to(self, device: torch.device | str) -> "Pack":
        """Return the pack with its patches on a device; the grid stays on the host."""
        return Pack(self.hidden_states.to(device, non_blocking=True), self.grid_thw)


def as_pack(hidden_states: Tensor | Pack, grid_thw: GridLike | None) -> Pack:
    """Return the arguments of a call as one pack.

    Raises: TypeError for a pack with another grid beside it, or patches without one.
    """
    if isinstance(hidden_states, Pack):
        if grid_thw is not None:
            raise TypeError("A Pack brings its own grid_thw. Leave the other one out.")
        return hidden_states
    if grid_thw is None:
        raise TypeError(
            "grid_thw is missing, which says how many patches each image has. Give a Pack, or both "
            "of its tensors: encoder(pack.hidden_states, pack.grid_thw)."
        )
    return Pack(hidden_states, as_tensor(grid_thw))


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The outputs of an encoder for a pack of N images whose frames are S sequences.

    Where a family attends over whole clips, each is one sequence. Merged tokens stand image after
    image, frame after frame, their squares in raster order.

    Shapes: tokens [T, D]; prefix [S, R, D]; pooled [S, D] or None where the checkpoint has no
    head; projected [S, E] or None; taps {layer: [T, D]}; segment_image [S] int64; merged [M, L] or
    None where not asked for; deepstack {layer: [M, L]}.
    """

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor | None
    projected: Tensor | None
    taps: dict[int, Tensor]
    segment_image: Tensor  # which image a row of pooled or prefix belongs to
    grid: Grid
    merged: Tensor | None
    deepstack: dict[int, Tensor]
    vector_rows: tuple[int, ...]  # how many of `merged`, or else of `tokens`, a sequence has

    def per_image(self) -> list[Tensor]:
        """Return the patch tokens of each image: N views [frames, rows, columns, D]."""
        parts = self.tokens.split([frames * rows * columns for frames, rows, columns in self.grid])
        return [part.unflatten(0, sides) for part, sides in zip(parts, self.grid, strict=True)]

    def vectors(self) -> Tensor:
        """Return one vector a sequence in fp32: projected if asked for, or pooled, or a mean.

        Shapes: [S, D]. Where the checkpoint has no head, the mean of the tokens, or of the merged
        ones [S, L] where they were asked for.
        """
        found = self.pooled if self.projected is None else self.projected
        if found is None:
            return image_means(
                self.tokens if self.merged is None else self.merged, self.vector_rows
            )
        return found.float()


def image_means(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean of each image's tokens in fp32, in one call that adds in a fixed order.

    `index_add` would add in whatever order a GPU's threads arrive.

    Shapes: tokens [T, D], lengths N host ints that sum to T -> [N, D].
    """
    counts = to_device(np.array(lengths), tokens.device)
    return torch.segment_reduce(tokens.float(), "mean", lengths=counts, unsafe=True)


def make_pack(
    images: Sequence[Source | Clip], cutting: Cutting, device: torch.device, temporal: int
) -> Pack:
    """Make one pack of images and clips, as `Encoder.pack` says; patches hold `temporal` frames."""
    check_list(images)
    if not images:
        raise ValueError("images is empty, but a pack holds at least one image.")
    cut = []
    for index, source in enumerate(images):
        try:
            frames = frames_of(source)
            if frames is None:
                cut.append(cutting.cut(load_image(source).image))
            else:
                cut.append(cut_clip(frames, cutting, temporal))
        except ImageError as error:
            error.index = index
            raise
    return lay(of_one_width(cut, temporal, cutting.order), cut, device)


def check_list(images: object) -> None:
    """Refuse a single image where a list is expected."""
    if isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray):
        raise TypeError(
            f"images is one {type(images).__name__}, but must be a list of them: [image]."
        )


def join(cut: Sequence[Patches], device: torch.device) -> Pack:
    """Return the patches of images as one pack on a device."""
    return lay([one.patches for one in cut], cut, device)


def lay(arrays: Sequence[np.ndarray], cut: Sequence[Patches], device: torch.device) -> Pack:
    """Return arrays of patches as one pack on a device, with the grid of the images `cut`."""
    patches = torch.from_numpy(np.concatenate(arrays))
    grid = [[one.frames, one.rows, one.columns] for one in cut]
    return Pack(patches.to(device), torch.tensor(grid, dtype=torch.int64, device="cpu"))
