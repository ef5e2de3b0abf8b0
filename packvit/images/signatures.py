"""What can be said of bytes that no parser took for an image: cut, of a kind not read, or nothing.

Looks at signatures, headers and offsets alone, and decodes nothing. No torch.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from packvit.images.heif import brands
from packvit.images.tiff import Verdict, explain_tiff, jpeg_start

# Formats of photographs and pictures of which Pillow knows nothing: a name, a place, what is there.
_OTHERS = (
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 0, b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("JPEG XR", 0, b"II\xbc"),
    ("OpenEXR", 0, b"v/1\x01"),
    ("Radiance HDR", 0, b"#?R"),
    ("a Fujifilm raw file", 0, b"FUJIFILMCCD-RAW"),
    ("a Sigma raw file", 0, b"FOVb"),
    ("a Panasonic raw file", 0, b"IIU\0"),
    ("an Olympus raw file", 0, b"IIR"),
    ("a Minolta raw file", 0, b"\0MRM"),
    ("PDF", 0, b"%PDF-"),
    ("AVI", 8, b"AVI "),
    ("Matroska", 0, b"\x1a\x45\xdf\xa3"),
    ("GIMP's XCF", 0, b"gimp xcf"),
    ("BPG", 0, b"BPG\xfb"),
    ("FLIF", 0, b"FLIF"),
)
# What a file must have beside the few bytes by which Pillow takes it for one of these: any text may
# begin with "/*" or "Py", and many other files with zeros and ones.
_PROOFS: dict[str, Callable[[bytes], bool]] = {
    "XBM": lambda data: b"_width" in data[:4096],
    "PPM": lambda data: data[2:3].isspace(),
    "PCX": lambda data: data[2:3] == b"\1" and data[3:4] in (b"\1", b"\2", b"\4", b"\x08"),
    "SGI": lambda data: data[2:3] in (b"\0", b"\1") and data[3:4] in (b"\1", b"\2"),
    "WMF": lambda data: data.startswith(b"\xd7\xcd\xc6\x9a") or data[40:44] == b" EMF",
    "ICO": lambda data: 0 < int.from_bytes(data[4:6], "little") <= 256,
    "CUR": lambda data: 0 < int.from_bytes(data[4:6], "little") <= 256,
    "DIB": lambda data: b"\1\0" in (data[8:10], data[12:14]),
}
_DIB_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_RLE = (1, 2)
# Frames of a JPEG that libjpeg does not read, by the second byte of their marker.
# Source: ITU-T T.81, table B.1; T.87 for JPEG-LS.
_FRAMES = {
    0xC3: "lossless JPEG",
    0xC5: "hierarchical JPEG",
    0xC6: "hierarchical JPEG",
    0xC7: "hierarchical JPEG",
    0xC9: "arithmetic JPEG",
    0xCA: "arithmetic JPEG",
    0xCB: "lossless JPEG",
    0xCD: "hierarchical JPEG",
    0xCE: "hierarchical JPEG",
    0xCF: "hierarchical JPEG",
    0xF7: "JPEG-LS",
}
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length


def identify(data: bytes, formats: Sequence[str]) -> Verdict:
    """Return the code and the note for bytes that Pillow's parsers of `formats` did not open.

    By Pillow's own checks of the first 16 bytes: a sound file of another format is told from noise
    without its parser ever seeing it.
    """
    if not data:
        return "unidentified", "empty file"
    Image.init()  # registers the checks of all formats
    verdicts = {name: _verdict(accept, data[:16]) for name, (_, accept) in Image.OPEN.items()}
    known = next((name for name in formats if verdicts.get(name)), None)
    if known is None:
        accepted = (name for name, verdict in verdicts.items() if verdict is True)
        other = next((name for name in accepted if _PROOFS.get(name, bool)(data)), None)
        other = other or _other(data)
        return ("unsupported_format", other) if other else ("unidentified", None)
    if isinstance(verdicts[known], str):
        return "unsupported_format", f"this Pillow lacks {known}"
    return explain(known, data, opened=False)


def explain(name: str | None, data: bytes, *, opened: bool) -> Verdict:
    """Return why Pillow did not read a file that begins as one of format `name` does.

    It may have `opened` it and failed on its pixels. What is whole by its own words, and of a kind
    that is not read, is no damaged file.
    """
    if name == "TIFF":
        if data[8:10] == b"CR":
            return "unsupported_format", "a Canon raw file"
        if opened and (start := jpeg_start(data)):
            return explain_jpeg(data[start:])
        return explain_tiff(data, opened)
    if name in ("JPEG", "MPO"):
        return explain_jpeg(data)
    if name == "BMP":
        return _explain_bmp(data, opened)
    if name == "AVIF" and not opened and _boxes_are_whole(data):
        return "unsupported_format", "AVIF of a kind that is not read"
    if name == "PNG" and data[12:16] == b"CgBI":
        return "unsupported_format", "PNG as Xcode packs it"
    return "truncated", None


def explain_jpeg(data: bytes) -> Verdict:
    """Return why a JPEG was not read, by its frame header."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, place = data[place + 1], place + 2
        if marker == 0xFF:  # filling
            place -= 1
        elif marker in _FRAMES:
            return "unsupported_format", _FRAMES[marker]
        elif marker in _PLAIN_FRAMES and place + 8 <= len(data):
            bits, channels = data[place + 2], data[place + 7]
            if bits != 8:
                return "unsupported_mode", f"JPEG of {bits} bits"
            if channels not in (1, 3, 4):
                return "unsupported_mode", f"JPEG of {channels} channels"
            break
        elif marker not in _STANDALONE:
            place += int.from_bytes(data[place : place + 2], "big")
    return "truncated", None


def _explain_bmp(data: bytes, opened: bool) -> Verdict:
    """Return why a BMP was not read. Source: the headers of Windows 2 to 5 and of OS/2 1 and 2."""
    try:
        start, header = struct.unpack_from("<II", data, 10)
    except struct.error:
        return "truncated", None
    if header not in _DIB_HEADERS and not 40 < header <= 124:
        return "unidentified", "starts like BMP"  # two letters are no proof
    try:
        if header == 12:
            width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
            compression = size = 0
        else:
            width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
            compression = size = 0
            if header > 16:
                compression, size = struct.unpack_from("<II", data, 30)
    except struct.error:
        return "truncated", None
    if compression in (0, 3, 6):
        size = (width * bits + 31) // 32 * 4 * abs(height)
    if start + size > len(data) or (opened and compression in _RLE):
        return "truncated", None
    return "unsupported_format", f"BMP of {bits} bits, compression {compression}"


def _other(data: bytes) -> str | None:
    """Name a format that Pillow does not know."""
    for name, place, signature in _OTHERS:
        if data.startswith(signature, place):
            return name
    if found := brands(data):
        return "a Canon raw file" if found[0] == b"crx " else "video"
    return None


def _verdict(accept: Callable[[bytes], Any] | None, prefix: bytes) -> Any:
    """Ask one of Pillow's checks. Text is its yes for what this Pillow was built without."""
    try:
        return accept is not None and accept(prefix)
    except Exception:  # as Pillow does: a check that trips over a short prefix says no
        return False


def _boxes_are_whole(data: bytes) -> bool:
    """Tell whether the outermost boxes of an AVIF are all there: what describes it, and its data.

    Source: ISO/IEC 14496-12, section 4.2.
    """
    place, kinds = 0, set()
    for _ in range(64):  # an image has a handful of boxes; junk may look like millions
        header = data[place : place + 16]
        size = int.from_bytes(header[:4], "big")
        size = int.from_bytes(header[8:], "big") if size == 1 else size
        if place >= len(data) or size < 8:  # the end; a box to the end of the file; junk
            break
        kinds.add(header[4:8])
        place += size
    stored = b"mdat" in kinds or b"idat" in data[:4096]
    return place <= len(data) and stored and not kinds.isdisjoint({b"meta", b"moov"})
