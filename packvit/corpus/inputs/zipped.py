"""Unpack a member of a zip file, found by its place. No torch.

Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3.7 local headers.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.reader import read_bounded
from packvit.images.errors import ImageError
from packvit.images.files import check_size

LOCAL = struct.Struct("<4s22xHH")  # lengths of the name and of what is added to it
DAMAGED = "the archive is damaged there"


@dataclass(frozen=True, slots=True)
class Zipped:
    """Where an input's bytes are in a zip: the offset of its header, and how they are packed."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int


def check_zipped(place: Zipped) -> None:
    """Refuse a member that is too large, or unpacks to far more than its size.

    Raises: ImageError unreadable.
    """
    check_size(max(place.size, place.packed))
    limits.check_unpacked(place.size, place.packed)


def find_packed(header: bytes, place: Zipped) -> int:
    """Return where the packed bytes of a member start, by its local header.

    Raises: ImageError truncated if that is no header.
    """
    if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
        raise ImageError("truncated", "read", DAMAGED)
    _, name, extra = LOCAL.unpack(header)
    return place.offset + LOCAL.size + name + extra


def open_member(file: Any, place: Zipped) -> zipfile.ZipExtFile:
    """Return a member as a file; `file` stands where its packed bytes start."""
    member = zipfile.ZipInfo()
    member.compress_type, member.CRC = place.method, place.crc
    member.compress_size, member.file_size = place.packed, place.size
    return zipfile.ZipExtFile(file, "r", member)


@contextmanager
def unpacking() -> Iterator[None]:
    """Turn what zipfile and the decompressors raise into an ImageError.

    Raises: ImageError truncated or unreadable.
    """
    try:
        yield
    except NotImplementedError as error:
        raise ImageError("unreadable", "read", "packed in a way that is not read") from error
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # of zlib, bz2, lzma and zipfile: no common class
        raise ImageError("truncated", "read", DAMAGED) from error


def unpack(data: bytes, place: Zipped) -> bytes:
    """Return what a member's packed bytes unpack to, which its directory's sum confirms.

    Raises: ImageError truncated or unreadable.
    """
    with unpacking(), open_member(BytesIO(data), place) as unpacked:
        found = read_bounded(unpacked, place.size)
    if len(found) < place.size:
        raise ImageError("truncated", "read", DAMAGED)
    return found


def read_start(file: Any, place: Zipped, most: int) -> bytes:
    """Return the first bytes of a member of an open zip, at most `most`.

    Raises: ImageError truncated or unreadable.
    """
    file.seek(place.offset)
    start = find_packed(file.read(LOCAL.size), place)
    file.seek(start)
    with unpacking(), open_member(file, place) as unpacked:
        return unpacked.read(most)
