"""transformers' image processors, and what holds where their settings say nothing. No torch.

A processor's settings are its class's defaults, overridden by what the file says; so the class that
the file names decides what an absent entry means.

Source: transformers 5.17, the classes named below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packvit.config import (
    CLIP_STATISTICS,
    HALF_STATISTICS,
    IMAGENET_STATISTICS,
    UNCHANGED_STATISTICS,
    Exact,
    Filter,
    MostPatches,
    PaddedPatches,
    PixelRange,
    ShortestEdge,
    Sizing,
    Statistics,
)

# Pillow's numbers, which are also those of a processor's settings.
FILTERS: Mapping[int, Filter] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a processor's settings say nothing.

    Units: `crop` (height, width) in pixels; with one, `do_center_crop` is true unless it is given.
    """

    statistics: tuple[Statistics, Statistics]  # mean and standard deviation
    resample: Filter
    sizing: Sizing | None  # without its crop
    crop: tuple[int, int] | None = None
    is_square: bool = False  # a size of one number is that of both sides, not of the shorter one
    normalizes: bool = True
    has_pillow: bool = True  # whether transformers has the class on Pillow too, as NAME + "Pil"


CLIP = Defaults(CLIP_STATISTICS, "bicubic", ShortestEdge(224), (224, 224))
KIMI_VL = Defaults(CLIP_STATISTICS, "bicubic", PaddedPatches(4096, fill=False), has_pillow=False)

# By their names in transformers, or in the code that comes with Kimi-VL.
PROCESSORS: Mapping[str, Defaults] = {
    "BitImageProcessor": CLIP,
    "CLIPImageProcessor": CLIP,
    "DINOv3ViTImageProcessor": Defaults(
        IMAGENET_STATISTICS, "bilinear", Exact(224, 224), is_square=True, has_pillow=False
    ),
    "Kimi_K25ImageProcessor": Defaults(
        HALF_STATISTICS, "bicubic", PaddedPatches(), has_pillow=False
    ),
    "KimiVLImageProcessor": KIMI_VL,
    "MoonViTImageProcessor": KIMI_VL,
    "Qwen2VLImageProcessor": Defaults(
        CLIP_STATISTICS, "bicubic", PixelRange(56 * 56, 28 * 28 * 1280)
    ),
    "SiglipImageProcessor": Defaults(HALF_STATISTICS, "bicubic", Exact(224, 224)),
    "Siglip2ImageProcessor": Defaults(HALF_STATISTICS, "bilinear", MostPatches(256)),
    "Tipsv2ImageProcessor": Defaults(
        UNCHANGED_STATISTICS, "bilinear", Exact(448, 448), normalizes=False, has_pillow=False
    ),
    "ViTImageProcessor": Defaults(HALF_STATISTICS, "bilinear", Exact(224, 224), is_square=True),
}


def processor_name(settings: Mapping[str, Any]) -> str | None:
    """Return the class that a processor's settings name, without its backend; None if none.

    Raises: ValueError for a class that we do not know; its message lacks the file's name.
    """
    named = settings.get("image_processor_type")
    if named is None:  # as it was called before there were image processors
        named = settings.get("feature_extractor_type")
        if named is None:
            return None
    found = str(named).replace("FeatureExtractor", "ImageProcessor")
    found = found.removesuffix("Fast").removesuffix("Pil")
    if found not in PROCESSORS:
        raise ValueError(
            f"the image processor {named}, but packvit knows {', '.join(PROCESSORS)}. Name one of "
            "them, where it prepares images alike."
        )
    return found
