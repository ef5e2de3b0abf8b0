"""RGB images to patches, pixel for pixel as the references' processors have them.

`to_patches` resizes and cuts; what a checkpoint asks for is read in `processors.py`. No torch.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from packvit.config import ImageConfig, PatchOrder
from packvit.images.errors import ImageError
from packvit.images.resize import Resize, resize_plan


@dataclass(frozen=True, slots=True)
class Patches:
    """One image as flattened raw patches in raster order, or the frames of a clip.

    Shapes: patches uint8 [frames * rows * columns, P], contiguous, P = side * side * 3, or of a
    clip as many times that as a patch holds frames.
    """

    patches: np.ndarray  # without jaxtyping, which takes a decode worker 12 MB and 0.1 s
    rows: int
    columns: int
    frames: int = 1  # of patches: a clip may have several times as many


@dataclass(frozen=True, slots=True)
class Whole:
    """The upright photograph that an image is a smaller copy of: its size, and where it shows it.

    `box` is (left, top, right, bottom) in the image's pixels, and parts of them.
    """

    height: int
    width: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Cutting:
    """How images become patches: by the checkpoint's preprocessing and the caller's options."""

    images: ImageConfig
    order: PatchOrder
    resize: Resize | None
    max_patches: int | None

    def for_frames(self) -> "Cutting":
        """Return how a clip's frames become patches, which a checkpoint may size otherwise."""
        sizing = self.images.frame_sizing
        return replace(self, images=replace(self.images, sizing=sizing)) if sizing else self

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image is resized to; raises as `resize_plan`."""
        plan = resize_plan(
            height, width, self.images, resize=self.resize, max_patches=self.max_patches
        )
        return plan.height, plan.width

    def cut(self, image: Image.Image, whole: Whole | None = None) -> Patches:
        """Return the patches of an RGB image, or of `whole`; raises as `to_patches`."""
        return to_patches(
            image,
            self.images,
            resize=self.resize,
            max_patches=self.max_patches,
            patch_order=self.order,
            whole=whole,
        )


def to_patches(
    image: Image.Image,
    config: ImageConfig,
    *,
    resize: Resize | None = None,
    max_patches: int | None = None,
    patch_order: PatchOrder = "hwc",
    whole: Whole | None = None,
) -> Patches:
    """Resize an RGB image as planned by `resize_plan`, with Pillow, and cut it into patches.

    With `whole` the plan is that of the photograph that the image is a smaller copy of.

    Raises: ImageError aspect_ratio or out_of_memory; ValueError as `resize_plan`.
    """
    if image.mode != "RGB":
        raise ValueError(f"The image has mode {image.mode}, not RGB. Pass it through load_image.")
    height, width = (whole.height, whole.width) if whole else (image.height, image.width)
    plan = resize_plan(height, width, config, resize=resize, max_patches=max_patches)
    try:
        if (width, height) != (plan.width, plan.height):
            resample = Image.Resampling[config.resample.upper()]
            box = whole.box if whole else None
            image = image.resize((plan.width, plan.height), resample, box)
        pixels = np.asarray(image)
        if plan.crop is not None:
            top, left, height, width = plan.crop
            pixels = pixels[top : top + height, left : left + width]
        missing = [plan.rows * config.patch, plan.columns * config.patch]
        if missing[0] > pixels.shape[0] or missing[1] > pixels.shape[1]:
            fill = [(0, max(0, n - m)) for n, m in zip(missing, pixels.shape, strict=False)]
            pixels = np.pad(pixels, (*fill, (0, 0)))
        patches = cut_patches(pixels, config.patch, patch_order)
    except MemoryError as error:
        raise ImageError("out_of_memory", "resize") from error
    return Patches(patches, plan.rows, plan.columns)


def cut_patches(pixels: np.ndarray, patch: int, order: PatchOrder = "hwc") -> np.ndarray:
    """Cut raw pixels into flattened patches; what is left over right and below is dropped.

    Shapes: uint8 [height, width, 3] -> uint8 [rows * columns, patch * patch * 3], raster order. A
    patch reads (row, column, channel), or (channel, row, column) where `order` is "chw".
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}, but must be uint8 [height, width, 3]."
        )
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    whole = pixels[: rows * patch, : columns * patch]
    cut = whole.reshape(rows, patch, columns, patch, 3)
    axes = (0, 2, 1, 3, 4) if order == "hwc" else (0, 2, 4, 1, 3)
    # Always a copy: Pillow's pixels are read-only, and tensors must not share them.
    return np.array(cut.transpose(axes), order="C").reshape(rows * columns, patch * patch * 3)
