"""A checkpoint's image settings to an `ImageConfig`, read as transformers reads them. No torch.

Source: transformers 5.17, image_processing_utils.py (`_set_attributes`, `get_size_dict`),
image_processing_backends.py, models/auto/image_processing_auto.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from packvit.checkpoints.folders import PREPROCESSOR
from packvit.checkpoints.processors import FILTERS, PROCESSORS, Defaults, processor_name
from packvit.config import (
    Exact,
    Filter,
    ImageConfig,
    MostPatches,
    PaddedPatches,
    PixelRange,
    ShortestEdge,
    Sizing,
    Statistics,
)

# A null is false to transformers. Of other entries it refuses one, and we take the default.
FLAGS = (
    "default_to_square",
    "do_center_crop",
    "do_normalize",
    "do_pad",
    "do_rescale",
    "do_resize",
    "pad_input",
    "use_square_size",
)


def image_config_from(
    settings: Mapping[str, Any] | None,
    default: ImageConfig,
    *,
    file: str = PREPROCESSOR,
    normalizes: bool = True,
) -> ImageConfig:
    """Read a checkpoint's image settings; the named class decides what an absent entry means.

    `default` is the family's, which holds where no class is named. One that neither resizes nor
    crops takes images as they are. `file` is where the settings come from, for messages.
    `normalizes` False is for families whose processor leaves pixels from 0 to 1, and `default` says
    by what the model normalises them.

    Raises: ValueError for settings that packvit cannot follow exactly; TypeError for an entry of
    another type than its processor takes.
    """
    whole = dict(settings or {})
    whole |= {flag: False for flag in FLAGS if flag in whole and whole[flag] is None}
    given = {key: value for key, value in whole.items() if value is not None}
    try:
        return _image_config(given, default, normalizes)
    except ValueError as error:
        raise ValueError(f"{file} has {error}") from error


def _image_config(given: Mapping[str, Any], default: ImageConfig, normalizes: bool) -> ImageConfig:
    """Return the settings; the message of a ValueError lacks the file's name."""
    name = processor_name(given)
    defaults = PROCESSORS[name] if name else _of_family(given, default, normalizes)
    _refuse_other_arithmetic({"do_normalize": defaults.normalizes, **given}, normalizes)
    patch = given.get("patch_size", default.patch)
    if patch not in (default.patch, {"height": default.patch, "width": default.patch}):
        raise ValueError(
            f"patch_size {patch}, but the model's patches are {default.patch} pixels a side. One "
            "of the two files belongs to another checkpoint."
        )
    merged = given.get("merge_size", default.multiple)
    if merged != default.multiple:
        raise ValueError(
            f"merge_size {merged}, but the model merges squares of {default.multiple} patches a "
            "side. One of the two files belongs to another checkpoint."
        )
    mean, std = defaults.statistics
    return ImageConfig(
        patch=default.patch,
        mean=_three(given, "image_mean", mean) if normalizes else default.mean,
        std=_three(given, "image_std", std) if normalizes else default.std,
        resample=_resample(given, defaults.resample),
        sizing=_sizing(given, name, defaults),
        frame_sizing=default.frame_sizing,
        multiple=default.multiple,
    )


def _of_family(given: Mapping[str, Any], default: ImageConfig, normalizes: bool) -> Defaults:
    """Return what holds where no class is named: the family's own preprocessing."""
    sizing, crop = default.sizing, getattr(default.sizing, "crop", None)
    if given.get("do_resize") is False:
        crop = None  # nor does the family's crop go without its resizing
    if "max_num_patches" in given and not isinstance(sizing, MostPatches):
        sizing = MostPatches()
    if isinstance(sizing, ShortestEdge):
        sizing = replace(sizing, crop=None)
        if isinstance(given.get("size"), Mapping) and "shortest_edge" not in given["size"]:
            crop = None  # the family's crop belongs to its own way of resizing
    elif isinstance(sizing, Exact):
        sizing = Exact(sizing.height, sizing.width)
    statistics = (default.mean, default.std)
    return Defaults(statistics, default.resample, sizing, crop, normalizes=normalizes)


def _refuse_other_arithmetic(given: Mapping[str, Any], normalizes: bool) -> None:
    steps = ("do_rescale", "do_normalize") if normalizes else ("do_rescale",)
    for step in steps:
        if given.get(step, True) is not True:
            raise ValueError(
                f"{step} {given[step]!r}, but our encoders always scale pixels to 0..1 and "
                "normalise them. Set it to true, or leave it out."
            )
    if not normalizes and given["do_normalize"] is not False:
        raise ValueError(
            f"do_normalize {given['do_normalize']!r}, but this model takes pixels from 0 to 1. Set "
            "it to false."
        )
    factor = given.get("rescale_factor", 1 / 255)
    if not isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(
            f"rescale_factor {factor}, but our encoders scale pixels by 1/255 = 0.00392157. Fold "
            "the difference into image_mean and image_std."
        )
    if _flag(given, "do_pad", False) and "pad_size" in given:
        raise ValueError(
            f"pad_size {given['pad_size']}, but our encoders never pad images. Set do_pad to false."
        )


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not true or false.")
    return value


def _three(given: Mapping[str, Any], key: str, default: Statistics) -> Statistics:
    """Return a number for each channel; a file may give one for all."""
    values = given.get(key, default)
    if _is_number(values):
        values = [values] * 3
    if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
        raise TypeError(f"{key} is {values!r}, not numbers.")
    if len(values) != 3:
        raise ValueError(f"{key} {values}, but RGB has 3 channels. Give a number for each.")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _resample(given: Mapping[str, Any], default: Filter) -> Filter:
    number = given.get("resample")
    if number is None:
        return default
    if isinstance(number, bool) or number not in FILTERS:
        raise ValueError(
            f"resample {number!r}, but Pillow's filters are "
            f"{', '.join(f'{key} ({name})' for key, name in FILTERS.items())}. Give one of these."
        )
    return FILTERS[number]


def _sizing(given: Mapping[str, Any], name: str | None, defaults: Defaults) -> Sizing | None:
    is_resized = _flag(given, "do_resize", defaults.sizing is not None or "size" in given)
    if isinstance(defaults.sizing, MostPatches):  # its processor looks at no size and no crop
        if not is_resized:
            return None
        return MostPatches(_side(given, "max_num_patches", defaults.sizing.patches))
    if isinstance(defaults.sizing, PixelRange):  # nor does that of Qwen crop
        return _pixel_range(given, defaults.sizing) if is_resized else None
    if isinstance(defaults.sizing, PaddedPatches):
        return _padded_patches(given, defaults.sizing) if is_resized else None
    crop = _crop(given, defaults.crop)
    if not is_resized:
        if crop is not None:
            raise ValueError(
                "do_center_crop without do_resize, so that small images would have to be padded. "
                "Set do_resize to true, or do_center_crop to false."
            )
        return None
    if name == "CLIPImageProcessor" and _flag(given, "use_square_size", False):
        return Exact(224, 224, crop)  # whatever size says
    sizing = defaults.sizing
    if (size := given.get("size")) is not None:
        is_square = _flag(given, "default_to_square", defaults.is_square)
        sizing = _size(size, is_square=is_square)
    if sizing is None:
        raise ValueError("do_resize, but no size. Add a size.")
    if isinstance(sizing, ShortestEdge):
        return replace(sizing, crop=crop)
    return Exact(sizing.height, sizing.width, crop)


def _pixel_range(given: Mapping[str, Any], default: PixelRange) -> PixelRange:
    """Return the fewest and the most pixels, which a file calls the edges of its size."""
    size = given.get("size", {"shortest_edge": default.least, "longest_edge": default.most})
    if not isinstance(size, Mapping):
        raise TypeError(f"size is {size!r}, not an object.")
    least = _side(given, "min_pixels") if "min_pixels" in given else _side(size, "shortest_edge")
    most = _side(given, "max_pixels") if "max_pixels" in given else _side(size, "longest_edge")
    if least > most:
        raise ValueError(f"min_pixels {least}, which is more than max_pixels {most}. Swap them.")
    return PixelRange(least, most)


def _padded_patches(given: Mapping[str, Any], default: PaddedPatches) -> PaddedPatches:
    """Return the most patches in all, and along a side, which a file calls the largest size."""
    size = given.get("size", {"max_height": default.side, "max_width": default.side})
    if not isinstance(size, Mapping):
        raise TypeError(f"size is {size!r}, not an object.")
    sides = {_side(size, "max_height"), _side(size, "max_width")}
    if len(sides) > 1:
        raise ValueError(f"size {dict(size)}, but both sides must be equal. Make them so.")
    most = _side(given, "max_patches", _side(given, "in_token_limit", default.patches))
    return PaddedPatches(most, sides.pop(), _flag(given, "pad_input", default.fill))


def _size(size: Any, *, is_square: bool) -> ShortestEdge | Exact:
    if isinstance(size, int):
        size = {"height": size, "width": size} if is_square else {"shortest_edge": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif not isinstance(size, Mapping):
        raise TypeError(f"size is {size!r}, not a number or an object.")
    sides = {key: value for key, value in size.items() if value is not None}
    if sides.keys() == {"shortest_edge"}:
        return ShortestEdge(_side(sides, "shortest_edge"))
    if sides.keys() == {"height", "width"}:
        return Exact(_side(sides, "height"), _side(sides, "width"))
    raise ValueError(
        f"size {dict(size)}, but only a number, shortest_edge alone, or height and width are "
        "understood. Give one of these."
    )


def _crop(given: Mapping[str, Any], default: tuple[int, int] | None) -> tuple[int, int] | None:
    if not _flag(given, "do_center_crop", default is not None):
        return None
    size = given.get("crop_size", default)
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    sides = size if isinstance(size, Mapping) else {}
    sides = {key: value for key, value in sides.items() if value is not None}
    if sides.keys() != {"height", "width"}:
        raise ValueError(
            f"do_center_crop, but crop_size {size}. Give a number, or height and width."
        )
    return _side(sides, "height"), _side(sides, "width")


def _side(given: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not a whole number.")
    if value < 1:
        raise ValueError(f"{key} {value}, but it must be 1 or more. Give a larger one.")
    return value
