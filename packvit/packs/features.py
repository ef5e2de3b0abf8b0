"""The input of an encoder's forward, and the outputs of `encode`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packvit.config import ImageConfig, PatchOrder
from packvit.images.decode import ImageError, Source, load_image
from packvit.images.patches import to_patches
from packvit.images.resize import Resize
from packvit.packs.segments import Grid


@dataclass(frozen=True, slots=True)
class Pack:
    """The input of one forward.

    Shapes: hidden_states [T, P] uint8 on the encoder's device; grid_thw [N, 3] int64 on the host.
    """

    hidden_states: Tensor
    grid_thw: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The outputs of an encoder for a pack of N images whose frames are S sequences.

    Shapes: tokens [T, D]; prefix [S, R, D]; pooled [S, D] or None where the checkpoint has no
    head; projected [S, E] or None; taps {layer: [T, D]}; segment_image [S] int64.
    """

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor | None
    projected: Tensor | None
    taps: dict[int, Tensor]
    segment_image: Tensor  # which image a row of pooled or prefix belongs to
    grid: Grid

    def per_image(self) -> list[Tensor]:
        """Return the patch tokens of each image: N views [frames, rows, columns, D]."""
        parts = self.tokens.split([frames * rows * columns for frames, rows, columns in self.grid])
        return [part.unflatten(0, sides) for part, sides in zip(parts, self.grid, strict=True)]


def make_pack(
    images: Sequence[Source],
    config: ImageConfig,
    *,
    resize: Resize | None,
    max_patches: int | None,
    patch_order: PatchOrder,
    device: torch.device,
) -> Pack:
    """Make one pack from paths, PIL images or uint8 arrays, for `Encoder.pack`."""
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
        raise TypeError(
            f"images is one {type(images).__name__}, but must be a list of them: "
            "encoder.pack([image])."
        )
    if not images:
        raise ValueError("images is empty, but a pack holds at least one image.")
    cut = []
    for index, source in enumerate(images):
        try:
            photo = load_image(source)
            cut.append(
                to_patches(
                    photo.image,
                    config,
                    resize=resize,
                    max_patches=max_patches,
                    patch_order=patch_order,
                )
            )
        except ImageError as error:
            error.index = index
            raise
    patches = torch.from_numpy(np.concatenate([one.patches for one in cut]))
    grid = torch.tensor(
        [[1, one.rows, one.columns] for one in cut], dtype=torch.int64, device="cpu"
    )
    return Pack(patches.to(device), grid)
