"""List the photographs in a zip file by their places. No torch.

A directory of a million members is read a piece at a time, and never by the decode workers.

Source: PKWARE's APPNOTE.TXT 6.3.10: 4.3.12 central directory, 4.5.3 sizes of 64 bits. Where its
words leave a choice, as Python's zipfile chooses.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.reader import open_source, unreadable
from packvit.corpus.inputs.tars import ArchiveEntry, Beside
from packvit.corpus.inputs.zip_directory import Directory, find_directory
from packvit.corpus.inputs.zipped import LOCAL, Zipped, read_start
from packvit.images.errors import ImageError

# System, flags, method, sum, packed size, size, three lengths, disk, mode, offset.
ENTRY = struct.Struct("<5xB2xHH4xIIIHHHH2xII")
ENCRYPTED, IS_UTF8 = 1, 0x800  # in a member's flags
WIDE, UNICODE_NAME = 1, 0x7075  # kinds of fields that are added
UNIX = 3  # the system that a member's mode is of
UNKNOWN = 0xFFFFFFFF  # of a number that has 64 bits elsewhere
PIECE = 1 << 20  # bytes of a directory that are read at once


def read_pieces(file: Any, directory: Directory) -> Iterator[bytes]:
    """Yield each entry of a directory whole, without its comment.

    Raises: ImageError truncated if it is damaged.
    """
    data, at, left = b"", 0, directory.size
    while left or at < len(data):
        if len(data) - at < ENTRY.size + 3 * 65535 and left:
            file.seek(directory.start + directory.size - left)
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
    path: str, suffixes: frozenset[bytes], keeping: Keeping
) -> Iterator[ArchiveEntry | Beside | bytes | None]:
    """Yield the photographs of a zip, what comes with them, and the names of all other files.

    A photograph's short name is its path without its suffix, which files that come with it share.
    None is yielded too, since it names no row.

    Raises: ImageError truncated, after the readable members, if it is damaged; or what opening it
    raises.
    """
    yield None
    with open_source(path) as file, unreadable():
        directory = find_directory(file)
        for entry in read_pieces(file, directory):
            member = read_entry(entry, directory)
            stem, suffix = os.path.splitext(member.name)
            if suffix.lower() in suffixes:
                place = None if member.code else member.place
                yield ArchiveEntry(stem, member.name, place, member.code)
                continue
            extension = suffix[1:].decode("utf-8", "replace")
            if member.code == "not_a_file":
                continue
            if keeping and keeping.wants_member(extension):
                data = None
                with suppress(ImageError):
                    data = read_start(file, member.place, limits.MOST_VALUES + 1)
                where = member.name.decode("utf-8", "backslashreplace")
                yield Beside(stem, keeping.read(extension, data, where))
            else:
                yield member.name


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a zip: its name without a folder's slash, its place, and its error code."""

    name: bytes
    place: Zipped
    code: str | None


def read_entry(entry: bytes, directory: Directory) -> Entry:
    """Return what an entry of a directory says.

    Raises: ImageError truncated if numbers are missing.
    """
    system, flags, method, crc, packed, size, length, extra, _, disk, mode, offset = (
        ENTRY.unpack_from(entry)
    )
    written, added = entry[ENTRY.size : ENTRY.size + length], entry[len(entry) - extra :]
    raw = written.partition(b"\0")[0]
    name = raw if flags & IS_UTF8 else raw.decode("cp437").encode()
    name = find_unicode_name(added, written) or name
    packed, size, offset = widen(added, size, packed, offset)
    place = Zipped(offset + directory.before, packed, size, method, crc)
    code = None
    if name.endswith(b"/") or (system == UNIX and stat.S_ISLNK(mode >> 16)):
        code = "not_a_file"
    elif flags & ENCRYPTED or disk not in (0, 0xFFFF):
        code = "unreadable"
    elif place.offset + LOCAL.size + packed > directory.start:
        code = "truncated"
    return Entry(name.rstrip(b"/"), place, code)


def find_field(extra: bytes, wanted: int) -> bytes:
    """Return the data of the first field of a kind in what is added, empty if there is none."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def find_unicode_name(extra: bytes, written: bytes) -> bytes | None:
    """Return the name in UTF-8 that is added to the one `written`, or None.

    Source: APPNOTE.TXT 4.6.9; Python 3.12's zipfile, which refuses what is damaged, while here the
    written name counts.
    """
    field = find_field(extra, UNICODE_NAME)
    if len(field) < 5 or struct.unpack_from("<BI", field) != (1, zlib.crc32(written)):
        return None
    name = field[5:].partition(b"\0")[0]
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return name or None


def widen(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Return a member's packed size, size and offset, those of 64 bits from what is added.

    Raises: ImageError truncated if they are not there.
    """
    numbers = {"size": size, "packed": packed, "offset": offset}
    wide = find_field(extra, WIDE)
    place = 0
    for name, number in numbers.items():
        if number == UNKNOWN and wide:
            if place + 8 > len(wide):
                raise ImageError("truncated", "list")
            (numbers[name],) = struct.unpack_from("<Q", wide, place)
            place += 8
    return numbers["packed"], numbers["size"], numbers["offset"]
