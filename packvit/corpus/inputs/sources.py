"""Inputs, and reading their bytes: files, URLs, members of archives, rows of tables. No torch.

An input is sent to decode workers, so it is a small value with all that is needed to read it. Every
error of reading becomes an ImageError with a code.
"""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from threading import Lock
from typing import Any, Literal

from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import ALLOWED, check_protocols, is_url, protocols, spell
from packvit.corpus.inputs.pages import get_bounded_client
from packvit.corpus.inputs.retries import find_status, persist
from packvit.images.decode import MAX_BYTES, ImageError, find_file, read_file

# The package that fsspec needs for a protocol.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "http": "'packvit[http]'"}
PACKAGES["https"] = PACKAGES["http"]
# The most bytes of a file whose length is unknown or may be wrong, as with compressed transfers.
MOST_UNDECLARED = 256 << 20
MOST_RATIO = 200  # of unpacked to packed size, above that: photographs hardly compress
MOST_KEPT = 64 << 20  # bytes of a table's dictionary, in the rows that are kept
GONE = (404, 410)  # HTTP statuses for what does not exist
ROWS, BATCHES = 16, 4  # of a table, read at once and kept: decoders read slightly out of order


@dataclass(frozen=True, slots=True)
class Member:
    """Where an input's bytes are in its archive."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Which cell of a Parquet file holds an input's bytes: row `row` of row group `group`."""

    group: int
    row: int
    column: str  # dotted where the bytes are a field of a struct


@dataclass(frozen=True, slots=True)
class Input:
    """One input: the id of its row, its path, and an error if listing found one."""

    id: str  # always valid UTF-8
    path: str  # a path, with surrogates for bytes that are not UTF-8; or a URL
    error: tuple[str, str] | None = None  # (code, stage) of an input that can't be read
    within: Member | Cell | None = None  # None: all of the file


def read(source: Input) -> bytes:
    """Return the bytes of an input; a server that is busy is asked again.

    Raises: ImageError missing, not_a_file, unreadable, truncated or out_of_memory.
    """
    if is_url(source.path):
        return persist(lambda: read_once(source))
    return read_once(source)


def read_once(source: Input) -> bytes:
    """Return the bytes of an input, or raise as `read` does."""
    if isinstance(source.within, Cell):
        return read_cell(source.path, source.within)
    member = source.within
    if member and member.size > MAX_BYTES:
        raise ImageError("unreadable", "read", f"over {MAX_BYTES >> 30} GiB")
    if is_url(source.path):
        try:
            data = read_url(source.path, member)
        except UsageError as error:
            note = f"its protocol is none of {', '.join(ALLOWED)}"
            raise ImageError("unreadable", "read", note) from error
        except (
            ImportError
        ) as error:  # where it can be known, this is reported before the job starts
            note = "what reads its protocol is not installed"
            raise ImageError("unreadable", "read", note) from error
    elif member:
        data = read_file(source.path, member.offset, member.size)
    else:
        data = read_file(source.path)
    if member and len(data) < member.size:
        raise ImageError("truncated", "read", "the archive ends before it")
    return data


def find_url(url: str, *, pages: bool = False) -> tuple[Any, str]:
    """Return the fsspec file system that a URL names, and its path there.

    `pages` limits the size of pages of links, which are read whole.

    Raises: UsageError for a protocol that is not allowed; ImportError with what to install.
    """
    check_protocols(url)
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class

    try:
        options: dict[str, Any] = {"use_listings_cache": False}
        if pages and is_web(url):
            options["get_client"] = get_bounded_client
        files, place = url_to_fs(url, **options)
    except ImportError as error:
        for protocol in protocols(url):  # of which one is not installed
            try:
                get_filesystem_class(protocol)
            except ImportError:
                package = PACKAGES.get(protocol, f"what fsspec needs for {protocol}")
                raise ImportError(f"{spell(url)} cannot be read: pip install {package}") from error
        raise
    if is_hub(files):
        # It caches listings regardless, also one that failed half-way: files after that would be
        # missing.
        files.dircache.clear()
    return files, place


def is_hub(files: Any) -> bool:
    """Return whether a file system is huggingface_hub's."""
    return files.protocol == "hf"


def take_for_file(files: Any, place: str, size: int | None) -> None:
    """Enter a file of `size` in the listing cache of the hub's file system.

    Otherwise it lists the whole folder before it reads a file, in each worker.
    """
    name = files.resolve_path(place).unresolve()
    around = name.rpartition("/")[0]
    files.dircache[around] = [{"name": name, "type": "file", "size": size}]


def find_kind(url: str) -> Literal["file", "folder"]:
    """Return whether a URL is a file or a folder, by its server's answer.

    Raises: ImageError missing or unreadable, caused by the file system's exception.
    """
    return persist(lambda: find_kind_once(url))


def find_kind_once(url: str) -> Literal["file", "folder"]:
    """Return or raise as `find_kind` does."""
    with unreadable():
        files, place = find_url(url)
        options = {}
        if is_hub(files):
            if not files.resolve_path(place).path:
                return "folder"  # a whole repository
            options = {"expand_info": True}  # or it would list all of the folder around it
        found = files.info(place, **options)
        # Over http everything counts as a file; a page of links is a folder.
        web = {"http", "https"} & set(protocols(url)[:1])
        return "folder" if found["type"] == "directory" or (web and files.isdir(place)) else "file"


def open_source(path: str) -> Any:
    """Open a file or URL for reading bytes; pipes are refused.

    Returns Any, since fsspec's files act like BinaryIO but are not typed so.

    Raises: ImageError missing, not_a_file or unreadable.
    """

    def open_url() -> Any:
        with unreadable():
            files, place = find_url(path)
            if protocols(path) == ["file"]:
                find_file(place)  # which may be a pipe
            return files.open(place, "rb")

    if is_url(path):
        return persist(open_url)
    with unreadable():
        find_file(path)
        return open(path, "rb")


def read_url(url: str, member: Member | None) -> bytes:
    """Return the bytes of a URL, or of a member of the archive there."""
    with unreadable():
        files, place = find_url(url)
        if member:
            if not member.size:
                return b""
            end = member.offset + member.size
            options = {}
            if is_web(url):
                return read_part(files, place, member)
            if is_hub(files):
                take_for_file(files, place, end)
                options = {"cache_type": "none"}  # it would read 5 MiB ahead
            data = files.cat_file(place, start=member.offset, end=end, **options)
            if len(data) > member.size:  # all of it: from the start, and again for every member
                raise ImageError("unreadable", "read", "its server sends no parts of a file")
            return data
        if is_hub(files):
            take_for_file(files, place, None)
            with files.open(place, "rb", block_size=0) as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ImageError("unreadable", "read", f"over {MAX_BYTES >> 30} GiB")
            return data
        found = files.info(place)
        if found["type"] != "file":
            raise ImageError("not_a_file", "read")
        size = found.get("size") or 0
        packed = found.get("compress_size")  # of a zip's member
        if size > MAX_BYTES:
            raise ImageError("unreadable", "read", f"over {MAX_BYTES >> 30} GiB")
        if packed is not None and size > MOST_UNDECLARED and size > packed * MOST_RATIO:
            raise ImageError("unreadable", "read", f"unpacks to over {MOST_RATIO} times its size")
        if is_web(url):
            with files.open(place, "rb", block_size=0, size=size or None) as file:
                return read_bounded(file, max(size, MOST_UNDECLARED))
        if not size:  # its server may not give the size
            with files.open(place, "rb") as file:
                return read_bounded(file, MOST_UNDECLARED)
        return files.cat_file(place, start=0, end=size)


def is_web(url: str) -> bool:
    """Return whether a URL is read over http or https."""
    return protocols(url)[0] in ("http", "https")


def read_part(files: Any, place: str, member: Member) -> bytes:
    """Return a byte range of a file of a web server, which may ignore the range."""
    last = member.offset + member.size - 1
    headers = {"Range": f"bytes={member.offset}-{last}", "Accept-Encoding": "identity"}
    headers = {**files.kwargs.get("headers", {}), **headers}
    with files.open(place, "rb", block_size=0, size=member.size, headers=headers) as file:
        if file.r.status != 206:  # all of it: from the start, and again for every member
            raise ImageError("unreadable", "read", "its server sends no parts of a file")
        return read_bounded(file, member.size)


def read_bounded(file: Any, most: int) -> bytes:
    """Return the bytes of an open file up to `most`, whatever length its server gave.

    Raises: ImageError unreadable if there are more than `most`.
    """
    data = BytesIO()
    while chunk := file.read(1 << 20):
        if data.tell() + len(chunk) > most:
            raise ImageError("unreadable", "read", "longer than its server said, and than allowed")
        data.write(chunk)
    return data.getvalue()


@contextmanager
def unreadable() -> Iterator[None]:
    """Turn any exception of a file system into an ImageError: fsspec's have no common class.

    UsageError and ImportError pass through.
    """
    try:
        yield
    except (ImageError, UsageError, ImportError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("missing" if is_gone(error) else "unreadable", "read") from error
    except IsADirectoryError as error:
        raise ImageError("not_a_file", "read") from error
    except MemoryError as error:
        raise ImageError("out_of_memory", "read") from error
    except Exception as error:
        gone = find_status(error) in GONE
        raise ImageError("missing" if gone else "unreadable", "read") from error


def is_gone(error: OSError) -> bool:
    """Return whether the file really does not exist.

    fsspec raises FileNotFoundError for any http error, and the hub for private files; the cause
    has the real answer.
    """
    cause = error.__cause__
    status = find_status(cause)
    if status is not None:
        return status in GONE
    return not (isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp."))


class Cells:
    """One column of a Parquet file, read forwards a few rows at a time.

    A row group may be larger than memory, so none is held whole; rows that are read in order are
    read once. It is thread-safe.
    """

    def __init__(self, path: str, column: str) -> None:
        import pyarrow as pa
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
                if field != "path" and paths >= 0 and pa.types.is_string(kind.field(paths).type):
                    self.columns.append(f"{struct}.path")
        self.lock = Lock()
        self.group = self.first = self.next = -1  # the row group; the rows that are kept
        self.batches: Iterator[Any] = iter(())
        self.kept: deque[Any] = deque()
        self.most = BATCHES

    def get(self, group: int, row: int) -> bytes | str | None:
        """Return the bytes in a row of a row group, else its path, else None."""
        with self.lock:
            if group != self.group or row < self.first:
                rows, self.most = self.fit(group)
                self.group, self.first, self.next = group, 0, 0
                self.kept.clear()
                self.batches = self.file.iter_batches(
                    rows, row_groups=[group], columns=self.columns, use_threads=False
                )
            try:
                while row >= self.next:
                    self.advance()
            except BaseException:
                self.group = -1  # the next read starts afresh
                raise
            place = row - self.first
            for values in self.kept:
                if place < len(values[0]):
                    found = (each[place].as_py() for each in values)
                    return next((value for value in found if value is not None), None)
                place -= len(values[0])
            raise AssertionError("the row is among those that are kept")

    def fit(self, group: int) -> tuple[int, int]:
        """Return how many rows of a row group to read at once, and how many batches to keep.

        A dictionary's value is copied for each row that refers to it.

        Raises: ImageError unreadable if the data unpack to far more than their size.
        """
        facts = self.file.metadata.row_group(group)
        chunks = [facts.column(number) for number in range(facts.num_columns)]
        rows, most = ROWS, BATCHES
        for chunk in chunks:
            if chunk.path_in_schema not in self.columns:
                continue
            packed, size = chunk.total_compressed_size, chunk.total_uncompressed_size
            if size > MOST_KEPT and size > packed * MOST_RATIO:
                note = f"unpacks to over {MOST_RATIO} times its size"
                raise ImageError("unreadable", "read", note)
            if chunk.dictionary_page_offset is not None:
                shared = chunk.data_page_offset - chunk.dictionary_page_offset
                value = max(1, shared * size // max(1, packed))  # at most, of one in the dictionary
                rows = min(rows, max(1, MOST_KEPT // value))
                most = min(most, max(1, MOST_KEPT // (rows * value)))
        return rows, most

    def advance(self) -> None:
        """Read the next batch of rows, and drop the oldest."""
        if len(self.kept) >= self.most:
            self.first += len(self.kept.popleft()[0])
        (values,) = next(self.batches).columns
        fields = [column.rpartition(".")[2] for column in self.columns]
        split = [values.field(name) for name in fields] if "." in self.columns[0] else [values]
        self.kept.append(split)
        self.next += len(values)


# By process, since locks and remote files do not survive a fork, and by the version of the file.
@lru_cache(maxsize=4)
def open_cells(path: str, column: str, process: int, version: tuple[int, int]) -> Cells:
    """Return an open column of a Parquet file."""
    return Cells(path, column)


def read_cell(path: str, cell: Cell) -> bytes:
    """Return the bytes in a cell of a Parquet file."""
    if is_url(path):
        version = (0, 0)
    else:
        found = find_file(path)
        version = (found.st_size, found.st_mtime_ns)
    try:
        with unreadable():
            data = open_cells(path, cell.column, os.getpid(), version).get(cell.group, cell.row)
    except ImageError as error:
        if error.code != "unreadable" or error.note:
            raise
        raise ImageError("truncated", "read", "the table is damaged there") from error
    if isinstance(data, str) and data:  # a path alone, which datasets opens when it decodes
        return read(Input(spell(data), data))
    if not isinstance(data, bytes):
        raise ImageError("missing", "read", "null in the table")
    return data
