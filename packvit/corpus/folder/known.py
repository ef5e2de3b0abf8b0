"""The index of the rows that a job may take over from other folders; decode workers ask it.

It is an SQLite file beside the parts, for the time of the job. No torch, no pyarrow.
"""

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from packvit.corpus.inputs.addresses import is_url
from packvit.corpus.inputs.sources import Input

REUSED = "reused"  # the status of a row until it is taken over; it is never written


@dataclass(frozen=True, slots=True)
class Reuse:
    """Which rows may be taken over: the index, the folders that it counts, their fingerprints."""

    index: str
    folders: tuple[str, ...]
    fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: in which folder of `Reuse`, which part, and which row of that."""

    folder: int
    part: str
    row: int


@dataclass(frozen=True, slots=True)
class Trusted:
    """A file as it was when it was read last. Units: bytes; nanoseconds since 1970."""

    id: str
    size: int
    mtime: int
    sha256: str


def write_index(
    path: Path, rows: Iterable[tuple[str, Place]], trusted: Iterable[Trusted] = ()
) -> None:
    """Write the index of rows by their sha256; the first of equal ones counts.

    Raises: sqlite3.Error if the disk does not take it.
    """
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as index:
        index.executescript("""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE known(sha256 BLOB PRIMARY KEY, folder INT, part TEXT, row INT)
                WITHOUT ROWID;
            CREATE TABLE trusted(id TEXT PRIMARY KEY, size INT, mtime INT, sha256 TEXT)
                WITHOUT ROWID;
            BEGIN;
        """)
        index.executemany(
            "INSERT OR IGNORE INTO known VALUES (?, ?, ?, ?)",
            ((bytes.fromhex(sha), at.folder, at.part, at.row) for sha, at in rows),
        )
        index.executemany(
            "INSERT OR IGNORE INTO trusted VALUES (?, ?, ?, ?)",
            ((file.id, file.size, file.mtime, file.sha256) for file in trusted),
        )
        index.execute("COMMIT")


def open_index(path: str) -> sqlite3.Connection:
    """Open an index for reading."""
    name = f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1"
    return sqlite3.connect(name, uri=True, check_same_thread=False)


@lru_cache(maxsize=1)  # a worker has one job
def opened(path: str) -> sqlite3.Connection:
    """Return the index of a worker's job."""
    return open_index(path)


def is_known(path: str, sha256: str) -> bool:
    """Return whether a row of these bytes may be taken over."""
    return find_place(opened(path), sha256) is not None


def find_place(index: sqlite3.Connection, sha256: str) -> Place | None:
    """Return where the row of these bytes is, or None."""
    asked = "SELECT folder, part, row FROM known WHERE sha256 = ?"
    found = index.execute(asked, (bytes.fromhex(sha256),)).fetchone()
    return Place(*found) if found else None


def find_trusted(path: str, source: Input) -> str | None:
    """Return the sha256 that a file of this name, size and time of change had, or None."""
    asked = "SELECT size, mtime, sha256 FROM trusted WHERE id = ?"
    found = opened(path).execute(asked, (source.id,)).fetchone()
    if found is None:
        return None
    size, mtime, sha256 = found
    return sha256 if stat_input(source) == (size, mtime) and is_known(path, sha256) else None


def stat_input(source: Input) -> tuple[int, int] | None:
    """Return the size and the time of change of an input's file, or of the archive it is in."""
    if source.error or is_url(source.path):
        return None
    try:
        found = os.stat(source.path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
