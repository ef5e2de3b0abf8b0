"""HEIC and other HEIF images, which Pillow leaves to pi-heif: the extra "heic". No torch."""

from importlib.util import find_spec
from io import BytesIO

from PIL import ImageFile

INSTALL = "pip install 'packvit[heic]'"
# Source: ISO/IEC 23008-12, annex B and E, and 14496-12: what is coded by HEVC.
_HEVC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_STRUCTURE = frozenset({b"mif1", b"mif2", b"msf1", b"miaf", b"1pic"})  # by whichever codec
_AV1 = frozenset({b"avif", b"avis"})


def brands(data: bytes) -> list[bytes]:
    """Return the brands of an ISO media file, the major one first; of anything else none."""
    if data[4:8] != b"ftyp" or len(data) < 12:
        return []
    end = min(int.from_bytes(data[:4], "big"), 4096)
    listed = data[16:end]
    return [data[8:12], *(listed[at : at + 4] for at in range(0, len(listed), 4))]


def is_heif(data: bytes) -> bool:
    """Tell a HEIF from an AVIF, which is one too, and from videos."""
    found = brands(data)
    if not found or found[0] in _AV1:
        return False
    if found[0] in _HEVC:
        return True
    return found[0] in _STRUCTURE and not _AV1 & set(found)


def is_avif(data: bytes) -> bool:
    """Tell whether a file says that it is an AVIF."""
    return not _AV1.isdisjoint(brands(data))


def open_heif(file: BytesIO) -> ImageFile.ImageFile | None:
    """Return a HEIF with its header read, or None where pi-heif is not installed.

    It comes upright, and its primary image first. Pillow is not told of the format, so nothing
    changes for who uses Pillow too.

    Raises: SyntaxError, as Pillow's own formats do, for a file that cannot be read.
    """
    if find_spec("pi_heif") is None:
        return None
    from pi_heif.as_plugin import (  # pyright: ignore[reportMissingImports] # extra "heic"
        HeifImageFile,
    )

    return HeifImageFile(file)
