"""Read a cell of a Parquet file: the bytes of an image, or the path of one. No torch."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.addresses import is_url
from packvit.corpus.inputs.pages import Sizes, measure
from packvit.corpus.inputs.reader import find_version, open_source, unreadable
from packvit.images.errors import ImageError

TOO_LARGE = (
    f"it takes over {limits.MOST_OF_PAGE >> 20} MiB to unpack its page of the table; write fewer "
    "rows to a row group"
)
ROWS, BATCHES = 16, 4  # of a table, read at once and kept: decoders read slightly out of order


@dataclass(frozen=True, slots=True)
class Cell:
    """Which cell of a Parquet file holds an input's bytes: row `row` of row group `group`."""

    group: int
    row: int
    column: str  # dotted where the bytes are a field of a struct


class Cells:
    """One column of a Parquet file, read forwards a few rows at a time.

    A row group may be larger than memory, so none is held whole; rows that are read in order are
    read once. It is thread-safe.
    """

    def __init__(self, path: str, column: str) -> None:
        import pyarrow.parquet as pq

        source = open_source(path) if is_url(path) else path
        with unreadable():
            # Without a buffer pyarrow reads a column's part of a row group in one piece.
            self.file = pq.ParquetFile(
                source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
            self.columns = [column]
            struct, _, field = column.rpartition(".")
            if struct:
                kind = self.file.schema_arrow.field(struct).type
                paths = kind.get_field_index("path")
                if field != "path" and paths >= 0 and is_text(kind.field(paths).type):
                    self.columns.append(f"{struct}.path")
        self.lock = Lock()
        self.group = self.first = self.next = -1  # the row group; the rows that are kept
        self.batches: Iterator[Any] = iter(())
        self.kept: deque[Any] = deque()
        self.most = BATCHES
        self.held = 0  # bytes that this process held before it began to read the row group
        self.path = None if is_url(path) else path
        self.sizes: dict[int, Sizes] = {}  # of the pages of row groups

    def get(self, group: int, row: int, *, alone: bool) -> bytes | str | None:
        """Return the bytes in a row of a row group, else its path, else None.

        With `alone`, this may take MOST_MEMORY beside the largest page.

        Raises: ImageError out_of_memory where its page is too large.
        """
        with self.lock:
            facts = self.file.metadata.row_group(group)
            if group not in self.sizes:
                self.sizes[group] = measure(self.path, facts, self.columns)
            end = self.sizes[group].readable
            if end is not None and row >= end:
                raise ImageError("out_of_memory", "read", TOO_LARGE)
            if group != self.group or row < self.first:
                self.let_go()
                rows, self.most = fit(facts, self.columns)
                if end is not None:
                    rows = 1  # no batch reaches into a page that is too large
                self.held = limits.held_memory()
                self.first = self.next = 0
                self.batches = self.file.iter_batches(
                    rows, row_groups=[group], columns=self.columns, use_threads=False
                )
                self.group = group
            try:
                most = limits.MOST_MEMORY + self.sizes[group].largest
                limited = limits.limited_memory(most, self.held)
                with limited if alone else nullcontext():
                    while row >= self.next:
                        self.advance()
                    return self.take(row - self.first)
            except MemoryError as error:
                self.let_go()
                raise ImageError("out_of_memory", "read", TOO_LARGE) from error
            except BaseException:
                self.let_go()
                raise

    def take(self, place: int) -> bytes | str | None:
        """Return what is in a kept row; before a large value is copied, all else is freed."""
        for values in self.kept:
            if place < len(values[0]):
                for each in values:
                    found = each[place]
                    found = getattr(found, "value", found)  # of a dictionary's index
                    data = found.as_buffer() if hasattr(found, "as_buffer") else None
                    if data is not None and data.size > limits.MOST_KEPT:
                        del values, each, found
                        self.let_go()
                        return data.to_pybytes()
                    if (value := found.as_py()) is not None:
                        return value
                return None
            place -= len(values[0])
        raise AssertionError("the row is among those that are kept")

    def let_go(self) -> None:
        """Free what is unpacked; the next read starts again."""
        self.group = -1
        self.kept.clear()
        self.batches = iter(())

    def advance(self) -> None:
        """Read the next batch of rows, and drop the oldest."""
        if len(self.kept) >= self.most:
            self.first += len(self.kept.popleft()[0])
        (values,) = next(self.batches).columns
        fields = [column.rpartition(".")[2] for column in self.columns]
        split = [values.field(name) for name in fields] if "." in self.columns[0] else [values]
        self.kept.append(split)
        self.next += len(values)


def is_text(kind: Any) -> bool:
    """Return whether a column holds text, however its writer kept it in memory."""
    import pyarrow as pa

    if kind is None:
        return False
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_bytes(kind: Any) -> bool:
    """Return whether a column holds bytes, however its writer kept them in memory."""
    import pyarrow as pa

    if kind is None:
        return False
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    found = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return found or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)


def chunks(facts: Any, columns: Sequence[str]) -> list[Any]:
    """Return what the footer says of some columns of a row group."""
    found = [facts.column(number) for number in range(facts.num_columns)]
    return [chunk for chunk in found if chunk.path_in_schema in columns]


def fit(facts: Any, columns: Sequence[str], rows: int = ROWS) -> tuple[int, int]:
    """Return how many rows of a row group to read at once, up to `rows`, and how many batches fit.

    A dictionary's value is copied for each row that refers to it, and of large rows some may be
    much larger than others.

    Raises: ImageError unreadable if the data unpack to far more than their size.
    """
    most = BATCHES
    for chunk in chunks(facts, columns):
        packed, size = max(1, chunk.total_compressed_size), chunk.total_uncompressed_size
        if size > limits.MOST_KEPT and size > packed * limits.MOST_RATIO:
            note = f"unpacks to over {limits.MOST_RATIO} times its size"
            raise ImageError("unreadable", "read", note)
        value = size // max(1, facts.num_rows)  # on average
        if chunk.dictionary_page_offset is not None:
            shared = chunk.data_page_offset - chunk.dictionary_page_offset
            value = max(value, shared * size // packed)  # at most, of one in the dictionary
        elif size > limits.MOST_KEPT:
            rows = min(rows, ROWS)
            value = max(value, limits.MOST_KEPT // 4)
        rows = min(rows, max(1, limits.MOST_KEPT // max(1, value)))
        most = min(most, max(1, limits.MOST_KEPT // max(1, rows * value)))
    return rows, most


# By process, since locks and remote files do not survive a fork, and by the version of the file.
@lru_cache(maxsize=4)
def open_cells(path: str, column: str, process: int, version: tuple[int, int]) -> Cells:
    """Return an open column of a Parquet file."""
    return Cells(path, column)


@lru_cache(maxsize=1)  # each may hold a page
def open_alone(path: str, column: str, process: int, version: tuple[int, int]) -> Cells:
    """Return the same for a process whose memory is limited."""
    return Cells(path, column)


def read_cell(path: str, cell: Cell, *, alone: bool) -> bytes | str:
    """Return the bytes in a cell of a Parquet file, or the path there, which datasets opens.

    Raises: ImageError truncated, or missing if there is neither; or what opening it raises.
    """
    version = find_version(path)
    try:
        with unreadable():
            open_column = open_alone if alone else open_cells
            cells = open_column(path, cell.column, os.getpid(), version)
            data = cells.get(cell.group, cell.row, alone=alone)
    except ImageError as error:
        if error.code != "unreadable" or error.note:
            raise
        raise ImageError("truncated", "read", "the table is damaged there") from error
    if isinstance(data, bytes) or (isinstance(data, str) and data):
        return data
    raise ImageError("missing", "read", "null in the table")
