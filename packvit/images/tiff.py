"""What a TIFF says of itself: which are cut, which are not read, which Pillow would read wrongly.

No torch.
"""

import struct
from dataclasses import dataclass
from typing import Any, Literal

from PIL import ImageFile, TiffImagePlugin

Verdict = tuple[str, str | None]  # a code and a note

# struct's letter for the values of each type of tag, R being two numbers of 32 bits, a fraction.
# Source: TIFF 6.0, section 2; BigTIFF's 16 to 18.
_TYPES = {1: "B", 2: "s", 3: "H", 4: "L", 5: "R", 6: "b", 7: "s", 8: "h", 9: "l", 10: "R", 11: "f"}
_TYPES |= {12: "d", 13: "L", 16: "Q", 17: "q", 18: "Q"}
_SIZES = {"B": 1, "s": 1, "b": 1, "H": 2, "h": 2, "L": 4, "l": 4, "f": 4}
_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIZES |= {"R": 8, "d": 8, "Q": 8, "q": 8}

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
FILL_ORDER, STRIPS, SAMPLES, STRIP_BYTES, PLANAR = 266, 273, 277, 279, 284
TILES, TILE_BYTES, SUB_IMAGES, EXTRA, FORMAT = 324, 325, 330, 338, 339
REDUCED, JPEG_START, JPEG_BYTES, SUBSAMPLING, DNG = 254, 513, 514, 530, 50706
_LOOKED_AT = (
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, STRIP_BYTES, PLANAR, TILES),
    *(TILE_BYTES, SUB_IMAGES, EXTRA, FORMAT, REDUCED, JPEG_START, JPEG_BYTES, SUBSAMPLING, DNG),
)
# Pillow copies all tags twice, and makes a Python number of each of those that it goes by.
MOST_OF_TAGS = 220 << 20  # bytes
MOST_NUMBERS = 1 << 20
SMALL = 8 << 20  # bytes of a file whose tags need no check
# What libtiff reads in any build of Pillow; whether it reads others depends on the build.
_EVERYWHERE = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946}
_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}
YCBCR, LAB, RAW_SENSOR = 6, (8, 9, 10), (32803, 34892)
OLD_JPEG, JPEG = 6, 7


@dataclass(frozen=True, slots=True)
class Tags:
    """The whole numbers of a TIFF's first directory, and where all that it holds ends."""

    values: dict[int, tuple[int, ...]]
    end: int

    def first(self, tag: int, default: int) -> int:
        """Return the first value of a tag."""
        return (self.values.get(tag) or (default,))[0]


def read_tags(data: bytes) -> Tags:
    """Return the first directory of a TIFF.

    Raises: struct.error if the file is cut before the end of it.
    """
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    place, counts, entry, inside = ("Q", "Q", "HHQ", 8) if big else ("L", "H", "HHL", 4)
    (table,) = struct.unpack_from(order + place, data, inside)
    (entries,) = struct.unpack_from(order + counts, data, table)
    first = table + struct.calcsize(order + counts)
    step = struct.calcsize(order + entry) + inside
    end, values = first + entries * step + inside, {}
    if end > len(data):
        raise struct.error
    for index in range(entries):
        at = first + index * step
        tag, kind, count = struct.unpack_from(order + entry, data, at)
        at += step - inside
        letter = _TYPES.get(kind, "s")
        size = count * _SIZES[letter]
        if size > inside:
            (at,) = struct.unpack_from(order + place, data, at)
            end = max(end, at + size)
        # A table cannot hold more than the file does.
        if letter in "BHLQ" and size <= len(data) and count <= MOST_NUMBERS:
            values[tag] = struct.unpack_from(f"{order}{count}{letter}", data, at)
    return Tags(values, end)


def check_tags(data: bytes) -> Verdict | None:
    """Return why a TIFF must not even be opened: its tags would fill memory."""
    if len(data) <= SMALL or data[:4] not in _STARTS:
        return None
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    place, counts, entry, step = ("Q", "Q", "HHQ", 20) if big else ("L", "H", "HHL", 12)
    total = 0
    try:
        (table,) = struct.unpack_from(order + place, data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + counts, data, table)
        first = table + struct.calcsize(order + counts)
        for at in range(first, first + min(entries, MOST_NUMBERS) * step, step):
            tag, kind, count = struct.unpack_from(order + entry, data, at)
            if tag in _LOOKED_AT and count > MOST_NUMBERS:
                return "unsupported_format", f"TIFF with over {MOST_NUMBERS:,} strips or tiles"
            total += count * _SIZES.get(_TYPES.get(kind, "s"), 1)
    except struct.error:
        pass  # which Pillow finds
    if min(total, len(data)) > MOST_OF_TAGS:
        return "out_of_memory", f"tags of over {MOST_OF_TAGS >> 20} MiB"
    return None


def opened_tags(image: TiffImagePlugin.TiffImageFile) -> Tags:
    """Return what Pillow read of an opened TIFF's tags, as far as they are looked at here."""
    values = {}
    for tag in _LOOKED_AT:
        value: Any = image.tag_v2.get(tag, ())
        value = value if isinstance(value, tuple) else (value,)
        if value and all(isinstance(number, int) for number in value):
            values[tag] = value
        elif tag == DNG and value:
            values[tag] = (1,)  # its version, as bytes
    return Tags(values, 0)


def strips_end(tags: Tags) -> int:
    """Return where the last strip, tile or JPEG stream of the first image ends."""
    end = 0
    for starts, sizes in ((STRIPS, STRIP_BYTES), (TILES, TILE_BYTES), (JPEG_START, JPEG_BYTES)):
        pairs = zip(tags.values.get(starts, ()), tags.values.get(sizes, ()), strict=False)
        end = max([end, *(start + size for start, size in pairs)])
    return end


def explain_tiff(data: bytes, opened: bool) -> Verdict:
    """Return why a TIFF was not read, which had been `opened` or not even that."""
    if data.startswith(b"MM\0\x2b"):
        return "unsupported_format", "BigTIFF, its high bytes first"
    try:
        tags = read_tags(data)
    except struct.error:
        return "truncated", None
    if tags.end > len(data) or strips_end(tags) > len(data):
        return "truncated", None
    if refusal := refuse(tags):
        return refusal
    compression = tags.first(COMPRESSION, 1)
    if compression not in _EVERYWHERE:
        return "unsupported_format", f"TIFF of compression {compression}"
    if opened or not {WIDTH, HEIGHT} <= tags.values.keys() or _is_known(data[:2], tags):
        return "truncated", None
    return "unsupported_mode", _describe(tags)


def jpeg_start(data: bytes) -> int | None:
    """Return where the first JPEG of a whole TIFF of JPEGs begins; of others None."""
    try:
        tags = read_tags(data)
    except struct.error:
        return None
    if tags.first(COMPRESSION, 1) != JPEG or strips_end(tags) > len(data):
        return None
    return tags.first(STRIPS, tags.first(TILES, 0)) or None


def _is_known(order: bytes, tags: Tags) -> bool:
    """Tell whether Pillow has a name for pixels of this kind."""
    bits = tags.values.get(BITS, (1,))
    samples = tags.first(SAMPLES, 1)
    kind = (
        *(order, tags.first(PHOTOMETRIC, 0), (tags.first(FORMAT, 1),), tags.first(FILL_ORDER, 1)),
        bits[:samples] if len(bits) > 1 else bits * min(samples, 8),
        tags.values.get(EXTRA, ()),
    )
    return kind in TiffImagePlugin.OPEN_INFO and tags.first(PLANAR, 1) == 1


def _describe(tags: Tags) -> str:
    bits = tags.values.get(BITS, (1,))
    samples = tags.first(SAMPLES, len(bits))
    kind = _FORMATS.get(tags.first(FORMAT, 1), "unknown")
    each = "mixed" if len(set(bits)) > 1 else str(bits[0])
    photometric = tags.first(PHOTOMETRIC, 0)
    return f"TIFF of {samples} channels, {each} bits, {kind}, photometric {photometric}"


def refuse(tags: Tags) -> Verdict | None:
    """Return why a TIFF must not be read though Pillow would: what it gives is another picture."""
    if DNG in tags.values or tags.first(PHOTOMETRIC, 0) in RAW_SENSOR:
        return "unsupported_format", "DNG"
    if tags.first(REDUCED, 0) & 1 and SUB_IMAGES in tags.values:
        return "unsupported_format", "a camera's raw file, of which only a preview can be read"
    if tags.first(COMPRESSION, 1) != 1:
        return None
    photometric, samples = tags.first(PHOTOMETRIC, 0), tags.first(SAMPLES, 1)
    if photometric == YCBCR and tags.values.get(SUBSAMPLING, (2, 2)) != (1, 1):
        return "unsupported_mode", "uncompressed YCbCr with subsampling"
    if tags.first(PLANAR, 1) == 2 and samples > 1 and photometric in LAB:
        return "unsupported_mode", "CIELAB in separate planes"
    return None


def check_opened(image: ImageFile.ImageFile, size: int) -> Verdict | None:
    """Return why an opened TIFF of `size` bytes must not be decoded, or None, having mended it.

    What Pillow would give of these is another picture, or a part of one, without a word.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    tags = opened_tags(image)
    if refusal := refuse(tags):
        return refusal
    if tags.first(COMPRESSION, 1) == OLD_JPEG and strips_end(tags) > size:
        return "truncated", None  # libtiff fills up what is missing of these
    if tags.first(PLANAR, 1) == 2 and not image.use_load_libtiff:
        mend_planes(image)
    return None


def mend_planes(image: TiffImagePlugin.TiffImageFile) -> None:
    """Have an opened TIFF of separate, uncompressed planes read as it is stored.

    Pillow's own reader takes the letters of its name for a pixel ("RGB;16L") for names of planes
    ("R", "G", "B"), which are of 8 bits; libtiff, which it has read compressed ones, knows better.
    Of one channel the plane is the image, whatever is said of planes.
    """
    tags: Any = image.tag_v2
    if len(image.getbands()) == 1:
        tags[PLANAR] = 1
        image._setup()  # reads the tags again
        return
    whole = (0, 0, tags[WIDTH], tags[HEIGHT])
    pixel = image.mode + (";16N" if tags[BITS][0] == 16 else "")
    image.tile = [ImageFile._Tile("libtiff", whole, 0, (pixel, False, tags.offset))]
    image.use_load_libtiff = True
