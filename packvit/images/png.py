"""PNGs without the texts and profiles that Pillow refuses to unpack. No torch."""

import re
import struct
import zlib

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
# Pillow looks for the orientation in these. Source: Pillow 13.0, `Image.getexif`.
XMP, PROFILE = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
TURNED = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MOST_XMP = 16 << 20  # bytes that are looked through


def without_large_texts(data: bytes) -> tuple[bytes, bytes, bool]:
    """Return a PNG without texts and profiles beyond Pillow's limits, and what they say of upright.

    That is the entry of XMP that says which way is up, or nothing, and whether one may be missed.
    Whatever else is no part of the pixels may have as much as a text: Pillow keeps copies of it.
    Pixels need no text. Nothing else is unpacked further than to the limit. A damaged chunk stays,
    so that it is found to be damaged.
    """
    kept, start, place, memory = [], 0, len(SIGNATURE), 0
    upright, missed = b"", False
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + size
        if end > len(data):
            break
        if kind in TEXTS and size > PngImagePlugin.MAX_TEXT_MEMORY:
            told = int.from_bytes(data[end - 4 : end], "big")
            if zlib.crc32(memoryview(data)[place + 4 : end - 4]) == told:  # without a copy
                kept.append(data[start:place])
                start = end
            missed |= data.startswith((XMP, PROFILE), place + 8)
        elif kind in TEXTS:
            body = data[place + 8 : end - 4]
            length = unpacked_length(kind, body)
            refused = length is None or memory + length > PngImagePlugin.MAX_TEXT_MEMORY
            if refused and zlib.crc32(kind + body) == int.from_bytes(data[end - 4 : end], "big"):
                kept.append(data[start:place])
                start = end
                if body.startswith(XMP):
                    found = find_turned(kind, body)
                    upright, missed = upright or found or b"", missed or found is None
                missed |= body.startswith(PROFILE)
            else:
                memory += length or 0
        elif is_extra(kind) and size > PngImagePlugin.MAX_TEXT_CHUNK:
            kept.append(data[start:place])
            start = end
            missed |= kind == b"eXIf"
        place = end
    if not kept:
        return data, b"", False
    return b"".join([*kept, data[start:]]), upright, missed


def is_extra(kind: bytes) -> bool:
    """Tell whether a chunk may be left out: in lower case, and no frame of an animation.

    Source: PNG (third edition), 5.4.
    """
    return bool(kind[:1].islower() and kind != b"fdAT")


def find_turned(kind: bytes, body: bytes) -> bytes | None:
    """Return the orientation that XMP states, nothing if it has none, None if it is too large."""
    text = body.partition(b"\0")[2]
    packed = kind == b"zTXt" or text[:1] == b"\1"
    if kind == b"iTXt":
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind == b"zTXt":
        text = text[1:]
    if packed:
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(text, MOST_XMP + 1)
        except zlib.error:
            return None
    found = TURNED.search(text[:MOST_XMP])
    return found[0] if found else None if len(text) > MOST_XMP else b""


def unpacked_length(kind: bytes, body: bytes) -> int | None:
    """Return how many bytes of text Pillow keeps of a chunk, or None where it refuses the image.

    Source: PNG (third edition), 11.3.2.3 and 11.3.3: name, NUL, method, and what is packed; of an
    iTXt name, NUL, whether it is packed, method, language, NUL, translated name, NUL.
    """
    _, _, rest = body.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(body)
    if kind == b"iTXt":
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif rest[:1] == b"\0" or (not rest and kind == b"zTXt"):
        packed = rest[1:]
    else:
        return None  # packed in a way that there is not
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:  # Pillow passes over it
        return 0
    if unpacker.unconsumed_tail:
        return None
    return 0 if kind == b"iCCP" else len(text)
