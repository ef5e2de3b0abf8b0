"""Inputs, and reading their bytes: files, URLs, members of archives, rows of tables. No torch.

An input is sent to decode workers, so it is a small value with all that is needed to read it. Every
error of reading becomes an ImageError with a code.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import ALLOWED, is_url, spell
from packvit.corpus.inputs.cells import Cell as Cell
from packvit.corpus.inputs.cells import read_cell
from packvit.corpus.inputs.reader import read_part_of_url, read_url
from packvit.corpus.inputs.retries import persist
from packvit.corpus.inputs.unpacking import Spent, read_packed
from packvit.corpus.inputs.zipped import LOCAL, Zipped, check_zipped, find_packed, unpack
from packvit.images.errors import ImageError
from packvit.images.files import check_size, read_file


@dataclass(frozen=True, slots=True)
class Member:
    """Where an input's bytes are in its archive."""

    offset: int
    size: int
    packed: bool = False  # in the tar that a compressed one unpacks to


@dataclass(frozen=True, slots=True)
class Input:
    """One input: the id of its row, its path, and an error if listing found one."""

    id: str  # always valid UTF-8
    path: str  # a path, with surrogates for bytes that are not UTF-8; or a URL
    error: tuple[str, str] | None = None  # (code, stage) of an input that can't be read
    within: Member | Zipped | Cell | None = None  # None: all of the file
    kept: str | None = None  # a JSON array of what comes with it: see kept.py


def read(
    source: Input,
    *,
    pause: Callable[[float], None] = time.sleep,
    spent: Spent = lambda seconds: None,
    alone: bool = False,
) -> bytes:
    """Return the bytes of an input; a busy server is asked again after a `pause`.

    `spent` is called with the seconds in which an archive is unpacked. `alone` says that this
    process does nothing else, so that its memory can be limited meanwhile.

    Raises: ImageError missing, not_a_file, unreadable, truncated or out_of_memory.
    """
    if is_url(source.path):
        return persist(lambda: read_once(source, pause, spent, alone), pause=pause)
    return read_once(source, pause, spent, alone)


def read_once(source: Input, pause: Callable[[float], None], spent: Spent, alone: bool) -> bytes:
    """Return the bytes of an input, or raise as `read` does."""
    if isinstance(source.within, Cell):
        data = read_cell(source.path, source.within, alone=alone)
        if isinstance(data, bytes):
            return data
        return read(Input(spell(data), data), pause=pause, spent=spent, alone=alone)
    place = source.within
    if isinstance(place, Zipped):
        check_zipped(place)
        header = read_part(source.path, Member(place.offset, LOCAL.size), spent)
        start = find_packed(header, place)
        return unpack(read_part(source.path, Member(start, place.packed), spent), place)
    return read_part(source.path, place, spent)


def read_part(path: str, place: Member | None, spent: Spent) -> bytes:
    """Return the bytes of a file or URL, or of a part of it.

    Raises: ImageError as `read` does.
    """
    if place:
        check_size(place.size)
    where = (place.offset, place.size) if place else None
    if place and place.packed:
        data = read_packed(path, place.offset, place.size, spent)
    elif not is_url(path):
        data = read_file(path, *where) if where else read_file(path)
    else:
        try:
            data = read_part_of_url(path, *where) if where else read_url(path)
        except UsageError as error:
            note = f"its protocol is none of {', '.join(ALLOWED)}"
            raise ImageError("unreadable", "read", note) from error
        except ImportError as error:  # reported before the job starts, where it can be known
            note = "what reads its protocol is not installed"
            raise ImageError("unreadable", "read", note) from error
    if place and len(data) < place.size:
        raise ImageError("truncated", "read", "the archive ends before it")
    return data
