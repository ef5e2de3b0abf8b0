"""Read a compressed tar as the tar that it holds, from its start and as far as is asked. No torch.

What is unpacked goes to a file without a name in TMPDIR, where members are then read by their
offsets, in any order. Each process that reads an archive unpacks it once.
"""

import bz2
import gzip
import lzma
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from tempfile import TemporaryFile
from threading import Lock
from time import perf_counter
from typing import Any

from packvit.corpus import WriteError, no_room_for
from packvit.corpus.inputs import limits
from packvit.corpus.inputs.addresses import is_url
from packvit.corpus.inputs.reader import (
    find_version,
    open_source,
    open_stream,
    read_part_of_url,
    unreadable,
)
from packvit.images.errors import ImageError

FIRST = 8  # bytes that tell how a file is compressed
PIECE = 1 << 20  # bytes that are unpacked at once
STEP = 4096  # of which so many are asked for at once: those before a damage are lost
SPENT_SECONDS = 0.25  # that are told at once

# Called with the seconds that unpacking a piece took, which are no single image's.
Spent = Callable[[float], None]


def open_zstd(file: Any) -> Any:
    """Return what a file of zstd frames holds, as a file."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")


# By the first bytes, since some servers unpack what they send, and names may be wrong. Each reads
# files that were joined end to end.
OPENERS: tuple[tuple[re.Pattern[bytes], Callable[[Any], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&|\x17rE8)"), bz2.open),  # a tar's first file may be called BZh
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL), open_zstd),
)


def find_opener(start: bytes) -> Callable[[Any], Any] | None:
    """Return what opens a compressed file that starts so, or None if it is not compressed."""
    return next((opener for magic, opener in OPENERS if magic.match(start)), None)


def is_compressed(path: str) -> bool:
    """Return whether a file or URL is compressed, whatever it is called.

    False if it cannot be read, which opening it says.
    """
    try:
        if is_url(path):
            return find_opener(read_part_of_url(path, 0, FIRST)) is not None
        with open_source(path) as file, unreadable():
            return find_opener(file.read(FIRST)) is not None
    except ImageError:
        return False


class Packed:
    """The bytes of a compressed file, counted, with its first ones known."""

    closed = False  # pyarrow asks

    def __init__(self, file: Any) -> None:
        self.file = file
        self.count = 0
        with unreadable():
            self.start = file.read(FIRST)
        self.left = self.start

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`."""
        if self.left:
            data, self.left = self.left[:size], self.left[size:]
        else:
            with unreadable():
                data = self.file.read(size)
        self.count += len(data)
        return data

    read1 = read

    def close(self) -> None:
        """Do nothing: the file is closed by who opened it."""


class Unpacked:
    """A compressed tar as a file to read and seek in; it is thread-safe by `read_at`.

    Raises: ImageError truncated, where it is damaged, for what lies behind; unreadable if it
    unpacks to far more than its size, or if its server breaks off; WriteError if TMPDIR is full.
    """

    def __init__(self, path: str) -> None:
        file = open_stream(path) if is_url(path) else open_source(path)
        weakref.finalize(self, file.close)
        self.packed = Packed(file)
        opener = find_opener(self.packed.start)
        with spooling():
            self.spool = TemporaryFile(buffering=0)  # noqa: SIM115 # closed with this object
        weakref.finalize(self, self.spool.close)
        self.source = opener(self.packed) if opener else self.packed
        self.length = 0  # what is unpacked so far
        self.place = 0
        self.ended = False  # all is unpacked that can be
        self.error: ImageError | None = None  # of what is behind
        self.lock = Lock()

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *reason: object) -> None:
        self.spool.close()

    def seek(self, place: int) -> int:
        """Go to an offset of the tar."""
        self.place = place
        return place

    def tell(self) -> int:
        """Return the offset in the tar."""
        return self.place

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer than `size` only at the end."""
        data = self.read_at(self.place, size)
        self.place += len(data)
        return data

    def read_at(self, offset: int, size: int, spent: Spent = lambda seconds: None) -> bytes:
        """Return the bytes at an offset, fewer than `size` only at the end."""
        with self.lock:
            start = perf_counter()
            while self.length < offset + size and not self.ended:
                self.advance()
                if (seconds := perf_counter() - start) > SPENT_SECONDS:
                    spent(seconds)
                    start += seconds
            if self.length < offset + size and self.error:
                raise self.error
            if offset >= self.length:
                return b""
            return os.pread(self.spool.fileno(), min(size, self.length - offset), offset)

    def advance(self) -> None:
        """Unpack the next piece, or find the end or an error."""
        data = bytearray()
        try:
            while len(data) < PIECE and not self.ended:
                found = self.source.read1(STEP)
                data += found
                self.ended = not found
        except ImageError as error:
            self.error = error
        # What the decompressors raise for damage.
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            self.error = ImageError("truncated", "read", "the archive is damaged")
            self.error.__cause__ = error
        try:
            limits.check_unpacked(self.length + len(data), self.packed.count)
        except ImageError as error:
            self.error = error
            data.clear()
        self.ended |= self.error is not None
        rest = memoryview(data)
        with spooling():
            while rest:
                rest = rest[self.spool.write(rest) :]
        self.length += len(data)


@contextmanager
def spooling() -> Iterator[None]:
    """Turn an error of the temporary file into a WriteError with a message for the user."""
    try:
        yield
    except OSError as error:
        what = "A compressed archive could not be unpacked"
        raise no_room_for(what, error.strerror) from error


# By process, since a fork would share the offset of the archive, and by the version of the file.
# Inputs are sorted, so a worker needs one archive after the other.
@lru_cache(maxsize=1)
def open_unpacked(path: str, process: int, version: tuple[int, int]) -> Unpacked:
    """Return an open compressed tar."""
    return Unpacked(path)


def read_packed(path: str, offset: int, size: int, spent: Spent) -> bytes:
    """Return `size` bytes of a compressed tar from `offset` on, or what there is.

    Raises: ImageError as `Unpacked` and opening it do.
    """
    version = find_version(path)
    try:
        return open_unpacked(path, os.getpid(), version).read_at(offset, size, spent)
    except WriteError as error:
        open_unpacked.cache_clear()
        note = "TMPDIR has no room for what is unpacked"
        raise ImageError("unreadable", "read", note) from error
    except ImageError as error:
        if error.code != "truncated":  # a server may do better at the next try
            open_unpacked.cache_clear()
        raise
