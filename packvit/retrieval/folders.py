"""The vectors of a finished feature folder, read in blocks, so that memory does not grow with it.

No torch.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.folder.names import names_of
from packvit.corpus.folder.parts import Outputs, open_part
from packvit.corpus.folder.reader import (
    ChangedError,
    damaged,
    map_matrix,
    matrix_of,
    open_finished,
    read_whole,
)
from packvit.corpus.folder.stores import Folder, StorePath, find_folder
from packvit.corpus.folder.swapping import restore

BLOCK = 4096  # rows: 12 MiB at a width of 768
AHEAD = 2  # parts that are read while one is used


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A column of vectors of a finished folder, and the rows that they belong to."""

    folder: Folder
    manifest: dict[str, Any]
    column: str  # pooled or projected
    width: int  # D
    parts: tuple[str, ...]  # paths below the folder
    starts: tuple[int, ...]  # the first row of each part, and the number of rows
    exported: str | None  # the matrix of the column, if the job wrote it
    identity: tuple[int, int] | None  # of the folder on its disk: an update puts another there

    def __len__(self) -> int:
        return self.starts[-1]

    def blocks(self, rows: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors [rows, D] float32) in order; rows that are errors are NaN.

        Raises: UsageError if a file is missing or damaged.
        """
        if self.exported:
            matrix = self.map_exported(self.exported)
            for start in range(0, len(self), rows):
                yield start, np.asarray(matrix[start : start + rows], np.float32)
            return
        with ThreadPoolExecutor(AHEAD) as readers:
            pending = [readers.submit(self.read_part, n) for n in range(min(AHEAD, self.count))]
            for number, first in enumerate(self.starts[:-1]):
                part = pending.pop(0).result()
                if number + AHEAD < self.count:
                    pending.append(readers.submit(self.read_part, number + AHEAD))
                for start in range(0, len(part), rows):
                    yield first + start, part[start : start + rows]

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self.parts)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse what was read from a folder that has taken this one's place.

        Raises: ChangedError, in the place of an error too.
        """
        with not_replaced(self.folder, self.identity):
            yield

    def read(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of one part."""
        with self.unchanged():
            return read_whole(self.folder, self.parts[number], list(columns))

    def read_part(self, number: int) -> np.ndarray:
        """Return the vectors of one part."""
        table = self.read(number, [self.column])
        return np.asarray(to_matrix(table, self.column), np.float32)

    def map_exported(self, name: str) -> np.ndarray:
        """Return the exported matrix, of the dtype that the job wrote."""
        kind = np.dtype(Outputs.of_manifest(self.manifest).vector_dtype)
        with self.unchanged():
            return map_matrix(self.folder, name, (len(self), self.width), kind)

    def ids(self, number: int) -> pa.Array:
        """Return the ids of the rows of one part."""
        return self.read(number, ["id"])["id"].combine_chunks()

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return these columns of these rows, in their order; only their parts are read."""
        found: dict[int, dict[str, Any]] = {}
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            table = self.read(number, columns)
            wanted = [row for row, part in zip(rows, numbers, strict=True) if part == number]
            inner = table.take(pa.array([row - self.starts[number] for row in wanted]))
            found.update(zip(wanted, inner.to_pylist(), strict=True))
        return [found[row] for row in rows]

    def take_vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors [rows, D] of rows in ascending order; only their parts are read."""
        if self.exported:
            return np.asarray(self.map_exported(self.exported)[rows], np.float32)
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        taken = [
            self.read_part(number)[rows[numbers == number] - self.starts[number]]
            for number in np.unique(numbers).tolist()
        ]
        return np.concatenate([np.empty((0, self.width), np.float32), *taken])

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return these columns of all rows: names and sizes, which fit in memory."""
        tables = [self.read(number, columns) for number in range(self.count)]
        return pa.concat_tables(tables).combine_chunks()


def open_vectors(folder: str | os.PathLike[str], column: str = "pooled") -> Vectors:
    """Return a column of vectors of the feature folder of a finished job.

    Raises: UsageError if it is not one, or has no such column, or is replaced meanwhile.
    """
    path = find_folder(folder, name="FOLDER")
    restore(path)
    identity = identify(path)
    with not_replaced(path, identity):
        return find_vectors(path, column, identity)


def find_vectors(path: Folder, column: str, identity: tuple[int, int] | None) -> Vectors:
    """Return a column of vectors of a folder of this identity; raises as `open_vectors`."""
    manifest, names = open_finished(path), names_of(path)
    entries = read_commits(path)
    if not entries or sum(entry.rows for entry in entries) != manifest["inputs"]:
        raise damaged(path, names.commits)
    try:
        with open_part(path / entries[0].part) as file:
            schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, entries[0].part) from error
    if column not in schema.names:
        raise UsageError(
            f'{path} has no column {column}: the model "{manifest["model"]}" shares no space with '
            "text, or an earlier version wrote the folder."
        )
    exported = column == "pooled" and names.pooled in manifest["exports"]
    return Vectors(
        path,
        manifest,
        column,
        schema.field(column).type.list_size,
        tuple(entry.part for entry in entries),
        tuple(accumulate((entry.rows for entry in entries), initial=0)),
        names.pooled if exported and (path / names.pooled).exists() else None,
        identity,
    )


@contextmanager
def not_replaced(folder: Folder, identity: tuple[int, int] | None) -> Iterator[None]:
    """Refuse what was read if the folder is not, or no longer, the one of this identity.

    Raises: ChangedError, in the place of an error too.
    """
    try:
        yield
    finally:
        if identify(folder) != identity:
            raise ChangedError.of(folder)


def identify(folder: Folder) -> tuple[int, int] | None:
    """Return what a folder on a disk keeps when it is renamed; None in a store, or for none."""
    if isinstance(folder, StorePath) or not folder.exists():
        return None
    status = folder.stat()
    return status.st_dev, status.st_ino


def to_matrix(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of vectors [rows, D], NaN where a row is an error; a view where none is."""
    column = table[name].combine_chunks()
    if column.null_count:
        return matrix_of(table, name)
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror}.") from error
