"""What can be said of bytes that no parser took for an image: cut, of another format, or nothing.

Looks at signatures and offsets alone, and parses nothing. No torch.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

# Bytes per value of each type of a TIFF's tags. Source: TIFF 6.0, section 2; BigTIFF's 16 to 18.
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)


def identify(data: bytes, formats: Sequence[str]) -> tuple[str, str | None]:
    """Return the code and the note for bytes that Pillow's parsers of `formats` did not recognise.

    By Pillow's own checks of the first 16 bytes: a sound file of another format is told from noise
    without its parser ever seeing it.
    """
    if not data:
        return "unidentified", "empty file"
    Image.init()  # registers the checks of all formats
    verdicts = {name: _verdict(accept, data[:16]) for name, (_, accept) in Image.OPEN.items()}
    known = next((name for name in formats if verdicts.get(name)), None)
    if known is None:
        other = next((name for name, verdict in verdicts.items() if verdict is True), None)
        return ("unsupported_format", other) if other else ("unidentified", None)
    if isinstance(verdicts[known], str):
        return "unsupported_format", f"this Pillow lacks {known}"
    if _is_cut(known, data):
        return "truncated", None
    return "unidentified", f"starts like {known}"


def _verdict(accept: Callable[[bytes], Any] | None, prefix: bytes) -> Any:
    """Ask one of Pillow's checks. Text is its yes for what this Pillow was built without."""
    try:
        return accept is not None and accept(prefix)
    except Exception:  # as Pillow does: a check that trips over a short prefix says no
        return False


def _is_cut(name: str, data: bytes) -> bool:
    """Tell whether a TIFF's or AVIF's own offsets point past its end.

    Both may keep what a parser needs first behind the pixels. Without this, most cuts of them would
    pass for bytes that never were an image.
    """
    if name == "TIFF":
        try:
            return _tiff_end(data) > len(data)
        except struct.error:  # the cut went through what says where the rest is
            return True
    return name == "AVIF" and _boxes_end(data) > len(data)


def _tiff_end(data: bytes) -> int:
    """Return where the first directory of a TIFF ends, with the values it points to."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    place, counts, entry, inside = ("Q", "Q", "HHQQ", 8) if big else ("L", "H", "HHLL", 4)
    (table,) = struct.unpack_from(order + place, data, inside)
    (entries,) = struct.unpack_from(order + counts, data, table)
    first = table + struct.calcsize(order + counts)
    step = struct.calcsize(order + entry)
    end = first + entries * step + inside
    if end > len(data):
        return end
    for index in range(entries):
        _, kind, values, offset = struct.unpack_from(order + entry, data, first + index * step)
        size = values * _TIFF_SIZES[kind] if kind < len(_TIFF_SIZES) else 0
        if size > inside:
            end = max(end, offset + size)
    return end


def _boxes_end(data: bytes) -> int:
    """Return where the outermost boxes of an AVIF end. Source: ISO/IEC 14496-12, section 4.2."""
    place = 0
    for _ in range(64):  # an image has a handful of boxes; junk may look like millions
        header = data[place : place + 16]
        size = int.from_bytes(header[:4], "big")
        size = int.from_bytes(header[8:], "big") if size == 1 else size
        if place >= len(data) or size < 8:  # the end; a box to the end of the file; junk
            break
        place += size
    return place
