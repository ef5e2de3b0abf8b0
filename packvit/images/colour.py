"""Pixels of any mode to 8-bit RGB, as a viewer would show them on a white page.

Pillow's own convert("RGB") drops alpha, so that hidden colours appear, and clips 16-bit greys to
white, both in silence. No torch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

_ALPHA = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
_GREY16 = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# Formats in which writers leave the fourth byte of a pixel zero: without any alpha, viewers take an
# image of these for opaque.
_UNUSED_ALPHA = frozenset({"BMP", "DIB", "ICO", "CUR", "TGA"})
STRIP = 256  # rows that are scaled at a time, since that takes 8 bytes a pixel
_CONVERTED = frozenset({"CMYK", "YCbCr", "LAB", "HSV"})
# Not I and F: 32-bit integers and floats say nothing of what they count as white.
MODES = _ALPHA | _GREY16 | _CONVERTED | {"RGB", "RGBX", "L", "P", "1"}


def rescale_colour_key(image: ImageFile.ImageFile) -> None:
    """Give an unloaded PNG's transparent colour the depth of its pixels, as Pillow does not."""
    key: Any = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    depth = image.tile[0][3]
    if depth == "L;2":
        image.info["transparency"] = (key & 3) * 85
    elif depth == "L;4":
        image.info["transparency"] = (key & 15) * 17
    elif depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def to_rgb(
    image: Image.Image, tags: Mapping[int, Any], file_format: str | None = None
) -> tuple[Image.Image, list[str]]:
    """Return `image`, of one of MODES, as plain RGB, with notes on what that took.

    `tags` are those of a TIFF, and `file_format` is Pillow's name of what the image came in. The
    image is used up: its pixels and file go as soon as they can, so that no more than two images of
    this size are in memory; pixels of RGB are not even copied.
    """
    if image.mode in _GREY16:
        return _grey16_to_rgb(image, tags)
    if image.mode in _ALPHA or image.has_transparency_data:
        if image.mode == "La":  # premultiplied; Pillow has no shorter way out of it
            image = _turn_into("LA", image)
        image = _turn_into("RGBA", image)
        least, most = image.getchannel("A").getextrema()
        if least == 255:
            return _turn_into("RGB", image), []
        if most == 0 and file_format in _UNUSED_ALPHA:
            return _turn_into("RGB", image), ["alpha all zero, ignored"]
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas, ["alpha on white"]
    notes = [f"converted from {image.mode}"] if image.mode in _CONVERTED else []
    if image.mode != "RGB":
        return _turn_into("RGB", image), notes
    # A plain image over the same pixels, free of its file: a copy of 100 MP would be 400 MB.
    return image._new(image.im), notes


def _turn_into(mode: str, image: Image.Image) -> Image.Image:
    """Return an image in another mode, having let go of what it was; as it is if of that mode."""
    if image.mode == mode:
        return image
    converted = image.convert(mode)
    image.close()
    return converted


def _grey16_to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> tuple[Image.Image, list[str]]:
    """Scale the whole range to 0..255, to the nearest; the transparent value becomes white."""
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]  # a TIFF's may be 12
    peak = (1 << bits) - 1
    key = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    for top in range(0, image.height, STRIP):
        strip = grey[top : top + STRIP]
        values = np.asarray(image.crop((0, top, image.width, top + len(strip))))
        wide = values.astype(np.uint32)  # peak * 255 needs 24 bits
        wide *= 255
        wide += peak // 2
        wide //= peak
        strip[:] = wide
        if inverted:  # 0 is white: Pillow inverts those of 1 to 8 bits, and forgets 16
            strip[:] = 255 - strip
        if key is not None:
            strip[values == key] = 255
    image.close()
    notes = [f"{bits}-bit grey rescaled"]
    if key is not None:
        notes.append("alpha on white")
    return Image.fromarray(grey).convert("RGB"), notes
