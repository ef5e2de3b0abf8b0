"""Photographs to RGB pixels. A bad one ends as an ImageError that says why, and as nothing else.

Pillow refuses damaged files with a dozen kinds of exception, drops alpha, clips 16-bit greys to
white and ignores orientation, all in silence. This module is the one place that deals with it. It
never imports torch, so that decode workers stay small.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from threading import Lock

import numpy as np
from PIL import ExifTags, Image, ImageFile

from packvit.images.colour import MODES, rescale_colour_key, to_rgb
from packvit.images.errors import ImageError, Stage
from packvit.images.files import MAX_BYTES, read_file
from packvit.images.heif import INSTALL, is_avif, is_heif, open_heif
from packvit.images.png import SIGNATURE, without_large_texts
from packvit.images.signatures import explain, identify
from packvit.images.tiff import check_opened, check_tags

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000
# Pillow takes some 16 bytes a pixel to decode these, and up to 8 for others. Their decoders give a
# frame as bytes, to be copied; WebP's keeps two canvases too, and two copies of the file.
HEAVY = frozenset({"AVIF", "HEIF", "WEBP"})
MOST_COPIED = 120 << 20  # bytes of a file of these, of which their decoders make two copies
MOST_EXIF = 16 << 20  # bytes, of which copies are made


# What turns stored pixels upright. Source: EXIF 2.32, tag 0x0112.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Photo:
    """An upright RGB image of 8 bits; `note` says in fixed words what was done to make it one."""

    image: Image.Image
    width: int
    height: int
    note: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """An image whose header was read and found usable; none of its pixels is decoded yet."""

    image: ImageFile.ImageFile
    file: BytesIO
    pixels: int  # as a budget of memory counts them: those of HEAVY twice
    warns: bool  # decoding may make Pillow warn
    notes: tuple[str, ...] = ()


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Return the first frame of an image file, upright, on white where it is transparent.

    A file that is cut short never passes for whole; a flipped bit may, as most formats carry no
    checksum. The pixel limit is checked on the header, before memory is taken.

    Raises: ImageError.
    """
    return decode_opened(open_image(data, max_pixels=max_pixels))


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Opened:
    """Return the image file with its header read: what comes before memory is taken for pixels.

    Raises: ImageError.
    """
    notes, upright = [], b""
    if data.startswith(SIGNATURE):
        data, upright, missed = without_large_texts(data)
        if missed and not upright:
            notes.append("EXIF unreadable")
    file = BytesIO(data)
    image = _open(data, file)
    if upright:
        image.info.setdefault("xmp", upright)  # where Pillow looks for it, behind EXIF
    _check(image, max_pixels)
    warns = image.format == "TIFF" or (image.format == "PNG" and b"acTL" in data)
    pixels = image.width * image.height * (2 if image.format in HEAVY else 1)
    return Opened(image, file, pixels, warns, tuple(notes))


def decode_opened(opened: Opened) -> Photo:
    """Return the first frame of an opened image, as `decode` does.

    Raises: ImageError.
    """
    image = opened.image
    notes = [*opened.notes]
    with _boundary("header", "truncated"):
        rescale_colour_key(image)
        if _has_frames(image):
            notes.append("first frame of several")
    with _boundary("decode", "truncated"), _quiet() if opened.warns else nullcontext():
        try:
            image.load()
        except (MemoryError, Image.DecompressionBombError):
            raise
        except Exception as error:
            code, note = explain(image.format, opened.file.getvalue(), opened=True)
            raise ImageError(code, "decode", note) from error
    return _photo(image, image, notes, opened.file)


def load_image(source: object, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Return the photo in a path, a file's bytes, a PIL image or a uint8 array [height, width, 3].

    `source` is a Source; anything else is answered here, in words. Of several frames, a PIL image
    gives the one that it stands on. The caller's image or array is neither changed nor shared.

    Raises: ImageError for an image that cannot be used; TypeError or ValueError for an argument
    that is no image.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            return decode(read_file(source), max_pixels=max_pixels)
        except ImageError as error:
            error.add_note(f"Path: {os.fspath(source)!r}")  # for a traceback; never part of a row
            raise
    if isinstance(source, bytes):
        return decode(source, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        image = _from_array(source)
        _check(image, max_pixels)
        return _photo(image, image, [])
    if not isinstance(source, Image.Image):
        raise TypeError(
            "An image is a path, the bytes of a file, a PIL image or a uint8 array [height, width, "
            f"3], but this is a {type(source).__module__}.{type(source).__qualname__}. "
            "Give a tensor as tensor.numpy()."
        )
    _check(source, max_pixels)
    if isinstance(source, ImageFile.ImageFile) and source.tile:
        _check_opened(source, MAX_BYTES)
    with _boundary("decode", "truncated"):
        # Until it is loaded, a caller's image is a file of whatever format, warnings and all.
        with _quiet() if getattr(source, "tile", None) else nullcontext():
            source.load()
        copy = source.copy()  # converting a palette with alpha writes into the image it reads
    return _photo(source, copy, [])


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(
            f"An image array must be uint8 with values from 0 to 255, but this is {array.dtype}. "
            "Scale it and convert it with .astype(numpy.uint8)."
        )
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"An image array must be [height, width, 3] with at least 1 pixel, but this is "
            f"{list(array.shape)}. Repeat a grey channel three times; drop alpha."
        )
    return Image.fromarray(np.ascontiguousarray(array))


@contextmanager
def _boundary(stage: Stage, code: str) -> Iterator[None]:
    """Turn whatever a library raises into `code`: the only place that catches every Exception.

    OSError alone is not enough: a damaged AVIF is a RuntimeError or a SyntaxError, a damaged TIFF
    a KeyError, a tRNS chunk a struct.error.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", stage) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", stage) from error
    except Exception as error:
        raise ImageError(code, stage) from error


_one_at_a_time = Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings from surfacing, and from becoming errors where the user asks for that.

    What becomes of an image must not depend on the warning filters. They are one list for all
    threads, and two overlapping changes could leave it changed for good: hence the lock. It is
    held while a header or EXIF is read, which is quick, and while a TIFF or APNG is decoded.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes, file: BytesIO) -> ImageFile.ImageFile:
    """Read the header with the parsers of FORMATS alone; no other parser ever sees the bytes."""
    if len(data) > MOST_COPIED and (data[8:12] == b"WEBP" or is_heif(data) or is_avif(data)):
        raise ImageError("out_of_memory", "header", f"over {MOST_COPIED >> 20} MiB")
    if refusal := check_tags(data):
        raise ImageError(refusal[0], "header", refusal[1])
    with _boundary("header", "truncated"), _quiet():
        if is_heif(data):
            image = open_heif(file)
            if image is None:
                raise ImageError("unsupported_format", "header", f"HEIC: {INSTALL}")
            return image
        try:
            image = Image.open(file, formats=FORMATS)
        except (MemoryError, Image.DecompressionBombError):
            raise
        except Exception as error:
            code, note = identify(data, FORMATS)
            raise ImageError(code, "header", note) from error
        _check_opened(image, len(data))
        return image


def _check_opened(image: ImageFile.ImageFile, size: int) -> None:
    if refusal := check_opened(image, size):
        raise ImageError(refusal[0], "header", refusal[1])


def _check(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError("unidentified", "header", "no pixels")
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", "header", f"height {height}, width {width}")
    if image.mode not in MODES:
        raise ImageError("unsupported_mode", "header", f"mode {image.mode}")


def _has_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # damage behind the first frame, which is all that we read
        return False


def _photo(
    source: Image.Image, image: Image.Image, notes: list[str], file: BytesIO | None = None
) -> Photo:
    """Make a photo of `image`, which is ours to use up: `source` itself, or a copy of it.

    `file`, which `image` was loaded from, is closed.
    """
    with _boundary("decode", "truncated"):
        turn, readable = read_turn(source)
    if not readable:
        notes.append("EXIF unreadable")
    if file:
        file.close()  # its bytes may be as many as the pixels'
    with _boundary("decode", "unsupported_mode"):
        rgb, done = to_rgb(image, getattr(source, "tag_v2", {}), source.format)
        image.close()  # lets go of the file, and of pixels that `rgb` does not share
        if turn is not None:
            rgb = rgb.transpose(turn)
    rgb.info = {}  # no EXIF: whoever turns it by that again would turn it twice
    return Photo(rgb, rgb.width, rgb.height, "; ".join(notes + done) or None)


def read_turn(image: Image.Image) -> tuple[Image.Transpose | None, bool]:
    """Return what turns an image upright, and whether its EXIF could be read.

    A TIFF's is None: Pillow turns those while it loads them.
    """
    try:
        with _quiet():
            if "exif" in image.info:  # getexif gives a damaged block as an empty one the 2nd time
                if len(image.info["exif"]) > MOST_EXIF:
                    return None, False
                Image.Exif().load(image.info["exif"])
            return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1)), True
    except MemoryError:
        raise
    except Exception:
        return None, False
