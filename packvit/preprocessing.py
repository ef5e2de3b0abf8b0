"""RGB images to patches, pixel for pixel as the references' processors have them.

`image_config_from` reads how a checkpoint wants its images, `to_patches` resizes and cuts. No
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import numpy as np
from PIL import Image

from packvit.config import (
    Exact,
    Filter,
    ImageConfig,
    MostPatches,
    PatchOrder,
    ShortestEdge,
    Sizing,
)
from packvit.images import ImageError
from packvit.sizes import Resize, resize_plan

NAFLEX = frozenset(
    {"Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil"}
)
# Pillow's numbers, which are also those of preprocessor_config.json.
FILTERS: Mapping[int, Filter] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


@dataclass(frozen=True, slots=True)
class Patches:
    """One image as flattened raw patches in raster order.

    Shapes: patches uint8 [rows * columns, P], contiguous, P = side * side * 3.
    """

    patches: np.ndarray  # without jaxtyping, which takes a decode worker 12 MB and 0.1 s
    rows: int
    columns: int


def to_patches(
    image: Image.Image,
    config: ImageConfig,
    *,
    resize: Resize | None = None,
    max_patches: int | None = None,
    patch_order: PatchOrder = "hwc",
) -> Patches:
    """Resize an RGB image as planned by `resize_plan`, with Pillow, and cut it into patches.

    Raises: ImageError aspect_ratio or out_of_memory; ValueError as `resize_plan`.
    """
    if image.mode != "RGB":
        raise ValueError(f"The image has mode {image.mode}, not RGB. Pass it through load_image.")
    plan = resize_plan(image.height, image.width, config, resize=resize, max_patches=max_patches)
    try:
        if image.size != (plan.width, plan.height):
            resample = Image.Resampling[config.resample.upper()]
            image = image.resize((plan.width, plan.height), resample)
        pixels = np.asarray(image)
        if plan.crop is not None:
            top, left, height, width = plan.crop
            pixels = pixels[top : top + height, left : left + width]
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


def image_config_from(preprocessor: Mapping[str, Any] | None, default: ImageConfig) -> ImageConfig:
    """Read a checkpoint's preprocessor_config.json; what it leaves out, or null, is `default`'s.

    `size` may be a number (the shortest edge, as in old CLIP checkpoints), {"shortest_edge"} or
    {"height", "width"}; `max_num_patches`, or a processor of Siglip2's, means NaFlex. One that
    neither resizes nor crops takes images as they are.

    Raises: ValueError for preprocessing that we could only imitate wrongly.
    """
    given = {key: value for key, value in (preprocessor or {}).items() if value is not None}
    for step in ("do_rescale", "do_normalize"):
        if given.get(step, True) is not True:
            raise ValueError(
                f"preprocessor_config.json has {step} {given[step]!r}, but our encoders always "
                "scale pixels to 0..1 and normalise them. Set it to true, or leave it out."
            )
    factor = given.get("rescale_factor", 1 / 255)
    if not isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(
            f"preprocessor_config.json has rescale_factor {factor}, but our encoders scale pixels "
            "by 1/255 = 0.00392157. Fold the difference into image_mean and image_std."
        )
    patch = given.get("patch_size", default.patch)
    if patch not in (default.patch, {"height": default.patch, "width": default.patch}):
        raise ValueError(
            f"preprocessor_config.json has patch_size {patch}, but the model's patches are "
            f"{default.patch} pixels a side. One of the two files belongs to another checkpoint."
        )
    return ImageConfig(
        patch=default.patch,
        mean=_three(given, "image_mean", default.mean),
        std=_three(given, "image_std", default.std),
        resample=_resample(given, default.resample),
        sizing=_sizing(given, default.sizing),
    )


def _three(
    given: Mapping[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    values = given.get(key, default)
    if len(values) != 3:
        raise ValueError(f"preprocessor_config.json has {key} {values}, but RGB has 3 channels.")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _resample(given: Mapping[str, Any], default: Filter) -> Filter:
    number = given.get("resample")
    if number is None:
        return default
    if number not in FILTERS:
        raise ValueError(
            f"preprocessor_config.json has resample {number!r}, but Pillow's filters are "
            f"{', '.join(f'{key} ({name})' for key, name in FILTERS.items())}."
        )
    return FILTERS[number]


def _sizing(given: Mapping[str, Any], default: Sizing | None) -> Sizing | None:
    if not given.get("do_resize", default is not None or "size" in given):
        if given.get("do_center_crop", False):
            raise ValueError(
                "preprocessor_config.json crops without resizing, so that small images would have "
                "to be padded. Set do_resize to true, or do_center_crop to false."
            )
        return None
    if "max_num_patches" in given or given.get("image_processor_type") in NAFLEX:
        return MostPatches(given.get("max_num_patches", getattr(default, "patches", 256)))
    size = given.get("size")
    if size is None:
        if default is None:
            raise ValueError("preprocessor_config.json has do_resize, but no size. Add a size.")
        if isinstance(default, MostPatches):
            return default
        return replace(default, crop=_crop(given, default.crop))
    if isinstance(size, int):
        return ShortestEdge(size, _crop(given, getattr(default, "crop", None)))
    sides = {key: value for key, value in size.items() if value is not None}
    if sides.keys() == {"shortest_edge"}:
        return ShortestEdge(sides["shortest_edge"], _crop(given, getattr(default, "crop", None)))
    if sides.keys() == {"height", "width"}:
        return Exact(sides["height"], sides["width"], _crop(given, None))
    raise ValueError(
        f"preprocessor_config.json has size {size}, but only a number, shortest_edge alone, or "
        "height and width are understood."
    )


def _crop(given: Mapping[str, Any], default: tuple[int, int] | None) -> tuple[int, int] | None:
    size = given.get("crop_size", default)
    if not given.get("do_center_crop", size is not None):
        return None
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple):
        return size
    sides = {key: value for key, value in (size or {}).items() if value is not None}
    if sides.keys() != {"height", "width"}:
        raise ValueError(
            f"preprocessor_config.json has do_center_crop, but crop_size {size}. Give a number, or "
            "height and width."
        )
    return sides["height"], sides["width"]
