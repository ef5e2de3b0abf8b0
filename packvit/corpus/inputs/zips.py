"""List the photographs in a zip file by their places, and unpack one of them. No torch.

A directory of a million members is read a piece at a time, and never by the decode workers.

Source: PKWARE's APPNOTE.TXT 6.3.10: 4.3.7 local headers, 4.3.12 central directory, 4.5.3 sizes of
64 bits. Where its words leave a choice, as Python's zipfile chooses.
"""

import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.reader import open_source, read_bounded, unreadable
from packvit.corpus.inputs.zip_directory import Directory, find_directory
from packvit.images.decode import MAX_BYTES, ImageError

LOCAL = struct.Struct("<4s22xHH")  # lengths of the name and of what is added to it
# System, flags, method, sum, packed size, size, three lengths, disk, mode, offset.
ENTRY = struct.Struct("<5xB2xHH4xIIIHHHH2xII")
ENCRYPTED, IS_UTF8 = 1, 0x800  # in a member's flags
UNIX = 3  # the system that a member's mode is of
UNKNOWN = 0xFFFFFFFF  # of a number that has 64 bits elsewhere
PIECE = 1 << 20  # bytes that are read or unpacked at once


@dataclass(frozen=True, slots=True)
class Zipped:
    """Where an input's bytes are in a zip: the offset of its header, and how they are packed."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int


def read_pieces(file: Any, directory: Directory) -> Iterator[bytes]:
    """Yield each entry of a directory whole, without its comment.

    Raises: ImageError truncated if it is damaged.
    """
    file.seek(directory.start)
    data, at, left = b"", 0, directory.size
    while left or at < len(data):
        if len(data) - at < ENTRY.size + 3 * 65535 and left:
            more = file.read(min(PIECE, left))
            if not more:
                raise ImageError("truncated", "list")
            data, at, left = data[at:] + more, 0, left - len(more)
            continue
        if len(data) - at < ENTRY.size or not data.startswith(b"PK\1\2", at):
            raise ImageError("truncated", "list")
        name, extra, comment = struct.unpack_from("<HHH", data, at + 28)
        end = at + ENTRY.size + name + extra
        if end + comment > len(data):
            raise ImageError("truncated", "list")
        yield data[at:end]
        at = end + comment


def list_zip(
    path: str, suffixes: frozenset[bytes]
) -> Iterator[tuple[bytes, Zipped | None, str | None] | bytes]:
    """Yield the photographs of a zip: name, place, error code; and the names of all other files.

    Raises: ImageError truncated, after the readable members, if it is damaged; or what opening it
    raises.
    """
    with open_source(path) as file, unreadable():
        directory = find_directory(file)
        for entry in read_pieces(file, directory):
            (system, flags, method, crc, packed, size, length, extra, _, disk, mode, offset) = (
                ENTRY.unpack_from(entry)
            )
            raw = entry[ENTRY.size : ENTRY.size + length].partition(b"\0")[0]
            name = raw if flags & IS_UTF8 else raw.decode("cp437").encode()
            is_folder = name.endswith(b"/")
            if os.path.splitext(name.rstrip(b"/"))[1].lower() not in suffixes:
                if not is_folder:
                    yield name
                continue
            packed, size, offset = widen(entry[len(entry) - extra :], size, packed, offset)
            place = Zipped(offset + directory.before, packed, size, method, crc)
            code = None
            if is_folder or (system == UNIX and stat.S_ISLNK(mode >> 16)):
                code = "not_a_file"
            elif flags & ENCRYPTED or disk not in (0, 0xFFFF):
                code = "unreadable"
            elif place.offset + LOCAL.size + packed > directory.start:
                code = "truncated"
            yield name.rstrip(b"/"), None if code else place, code


def widen(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Return a member's packed size, size and offset, those of 64 bits from what is added.

    Raises: ImageError truncated if they are not there.
    """
    numbers = {"size": size, "packed": packed, "offset": offset}
    at = 0
    wide = b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    place = 0
    for name, number in numbers.items():
        if number == UNKNOWN and wide:
            if place + 8 > len(wide):
                raise ImageError("truncated", "list")
            (numbers[name],) = struct.unpack_from("<Q", wide, place)
            place += 8
    return numbers["packed"], numbers["size"], numbers["offset"]


def check_zipped(place: Zipped) -> None:
    """Refuse a member that is too large, or unpacks to far more than its size.

    Raises: ImageError unreadable.
    """
    if max(place.size, place.packed) > MAX_BYTES:
        raise ImageError("unreadable", "read", f"over {MAX_BYTES >> 30} GiB")
    ratio = limits.MOST_RATIO_OF_ZIP
    if place.size > limits.MOST_UNDECLARED and place.size > place.packed * ratio:
        raise ImageError("unreadable", "read", f"unpacks to over {ratio} times its size")


def find_packed(header: bytes, place: Zipped) -> int:
    """Return where the packed bytes of a member start, by its local header.

    Raises: ImageError truncated if that is no header.
    """
    if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
        raise ImageError("truncated", "read", "the archive is damaged there")
    _, name, extra = LOCAL.unpack(header)
    return place.offset + LOCAL.size + name + extra


def unpack(data: bytes, place: Zipped) -> bytes:
    """Return what a member's packed bytes unpack to, which its directory's sum confirms.

    Raises: ImageError truncated or unreadable.
    """
    member = zipfile.ZipInfo()
    member.compress_type, member.CRC = place.method, place.crc
    member.compress_size, member.file_size = place.packed, place.size
    file: Any = BytesIO(data)
    try:
        with zipfile.ZipExtFile(file, "r", member) as unpacked:
            found = read_bounded(unpacked, place.size)
    except NotImplementedError as error:
        raise ImageError("unreadable", "read", "packed in a way that is not read") from error
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # of zlib, bz2, lzma and zipfile: no common class
        raise ImageError("truncated", "read", "the archive is damaged there") from error
    if len(found) < place.size:
        raise ImageError("truncated", "read", "the archive is damaged there")
    return found
