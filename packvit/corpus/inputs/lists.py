"""Read lists of paths: lines of a text, or a column of a CSV, TSV, JSONL or Parquet file.

No torch.
"""

import codecs
import csv
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from packvit.corpus import UsageError
from packvit.corpus.inputs import limits
from packvit.corpus.inputs.addresses import bare, check_protocols, is_url, spell
from packvit.corpus.inputs.archives import describe_columns, find_kept, list_values
from packvit.corpus.inputs.cells import is_text
from packvit.corpus.inputs.kept import Keeping, read_object
from packvit.corpus.inputs.pages import check_footer
from packvit.corpus.inputs.reader import open_source
from packvit.corpus.inputs.suffixes import PHOTOGRAPHS
from packvit.corpus.inputs.unpacking import find_opener
from packvit.images.errors import CODES, ImageError

STDIN = "/dev/stdin"  # a list of lines, which a pipe may be
PIPED = ("-", STDIN, "/dev/fd/0", "/proc/self/fd/0")
PIECE = 1 << 16  # bytes of a list that are read at once
MOST_PEEK = 4096  # bytes of a file, to tell a text
# What would be read as lines of text, and each line be a row.
NO_LISTS = {*map(os.fsdecode, PHOTOGRAPHS), ".tar", ".zip", ".json", ".xlsx", ".xls", ".ods"}
ListRow = tuple[bytes, Mapping[str, Any]]  # a path, and the values of columns to keep
CONTROLS = frozenset(range(32)) - set(b"\t\n\r\f\x1b")


def read_list(path: str, column: str, keeping: Keeping) -> Iterator[tuple[bytes, str | None]]:
    """Yield the paths of a list with what comes with them, in order; its suffix says its kind.

    Of a table there is an item for each row; the path is empty where a row has none.

    Raises: UsageError if it cannot be read, has no such column, or no path at all.
    """
    suffix = os.path.splitext(bare(path))[1].lower()
    kind = {
        ".csv": read_csv,
        ".tsv": partial(read_csv, delimiter="\t"),
        ".jsonl": read_lines,
        ".ndjson": read_lines,
        ".parquet": read_parquet,
    }.get(suffix)
    if is_url(path):
        check_protocols(path)
    if suffix in NO_LISTS:
        raise UsageError(
            f"{spell(path)} is no list by its suffix. A list is a text with a path on each line, "
            "or a .csv, .tsv, .jsonl or .parquet; name photographs and archives without --list."
        )
    number, empty = 0, 0
    try:
        with open_list(path) as file:
            if kind is None:
                for line in unmarked(path, file):
                    if name := line.rstrip(b"\r\n"):
                        yield name, None
                return
            for name, values in kind(path, file, column, keeping):
                number += 1
                empty += not name
                yield name, keeping.encode(values, f"row {number} of {spell(path)}")
            if number and empty == number:
                raise UsageError(
                    f'{spell(path)} has no "{column}" in any row. Fill the column, or name another '
                    "with --column."
                )
    except ImageError as error:
        raise UsageError(f"The list {spell(path)} cannot be read: {CODES[error.code]}.") from error
    except OSError as error:
        raise UsageError(f"The list {spell(path)} cannot be read after row {number}.") from error


def open_list(path: str) -> Any:
    """Open a list; only stdin, and what a shell gives as `<(...)`, may be a pipe."""
    if path in PIPED:
        return os.fdopen(os.dup(0), "rb")
    if path.startswith("/dev/fd/"):
        return open(path, "rb")
    return open_source(path)


def looks_like_list(path: bytes, *, alone: bool) -> bool:
    """Return whether a file that is named as a photograph is a text, and likely a list.

    It is if nothing else is named, or if one of its first lines holds a URL or an existing path.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(MOST_PEEK)
    except OSError:
        return False
    start = start.removeprefix(codecs.BOM_UTF8)
    if not start.strip() or start.lstrip().startswith(b"<") or CONTROLS & set(start):
        return False  # an SVG is a text too
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    fields = [each for line in start.splitlines()[:2] for each in re.split(rb"[,;\t]", line)]
    found = (os.path.exists(each) or is_url(os.fsdecode(each)) for each in fields if each)
    return alone or any(found)


def unmarked(path: str, file: Any) -> Iterator[bytes]:
    """Yield the lines of a text without a UTF-8 byte order mark.

    Raises: UsageError for UTF-16, recognised by its byte order mark, for what is compressed, and
    for what has no lines.
    """
    for number, line in enumerate(lines(path, file)):
        if number:
            yield line
            continue
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UsageError(f"The list {spell(path)} is UTF-16. Save it as UTF-8.")
        if find_opener(line):
            raise UsageError(f"The list {spell(path)} is compressed. Decompress it.")
        if b"\0" in line:
            raise UsageError(
                f"The list {spell(path)} holds a NUL byte, as no path does. Give a path on each "
                "line, in UTF-8: `find` does so without -print0."
            )
        yield line.removeprefix(codecs.BOM_UTF8)


def lines(path: str, file: Any) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, in a bounded memory.

    Raises: UsageError for a line longer than any path, and for a URL without an end.
    """
    rest, size = b"", 0
    while data := file.read(PIECE):
        size += len(data)
        if is_url(path) and size > limits.MOST_LIST:
            most = f"{limits.MOST_LIST >> 30} GiB"
            raise UsageError(
                f"The list {spell(path)} has over {most}. Download it, and name the file."
            )
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > limits.MOST_LINE or any(len(line) > limits.MOST_LINE for line in whole):
            raise UsageError(
                f"{spell(path)} has a line of over {limits.MOST_LINE >> 20} MiB, so it is no list. "
                "Give a text with a path on each line; name a photograph without --list."
            )
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def read_csv(
    path: str, file: Any, column: str, keeping: Keeping, *, delimiter: str = ","
) -> Iterator[ListRow]:
    """Yield the rows of a CSV or TSV file whose first line names its columns."""
    try:
        text = codecs.iterdecode(unmarked(path, file), "utf-8", "surrogateescape")
        rows = csv.reader(text, delimiter=delimiter)
        names = next(rows, [])
        if names.count(column) != 1:
            raise no_column(path, column, ", ".join(names))
        place = names.index(column)
        keeping.meet(names)
        kept = {name: names.index(name) for name in keeping.names if names.count(name) == 1}
        for row in rows:
            if row:  # an empty line is no row
                name = row[place] if place < len(row) else ""
                values = {name: row[at] or None for name, at in kept.items() if at < len(row)}
                yield name.encode("utf-8", "surrogateescape"), values
    except csv.Error as error:
        raise UsageError(f"{spell(path)} cannot be read as a table: {error}.") from error


def read_lines(path: str, file: Any, column: str, keeping: Keeping) -> Iterator[ListRow]:
    """Yield the rows of a file with a JSON object on each line."""
    met = False  # whether any line has the column
    for number, line in enumerate(unmarked(path, file), 1):
        if not line.strip():
            continue
        try:
            values = read_object(line)
            name = values.get(column) or ""
            encoded = os.fsencode(name) if isinstance(name, str) else None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{spell(path)} has no JSON object in line {number}.") from error
        met = met or column in values
        if not met:
            raise no_column(path, column, ", ".join(values))
        if encoded is None:
            raise UsageError(f'{spell(path)} has a "{column}" that is no text in line {number}.')
        keeping.meet(values)
        yield encoded, values


def read_parquet(path: str, file: Any, column: str, keeping: Keeping) -> Iterator[ListRow]:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_footer(file)
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        kind = schema.field(column).type if schema.names.count(column) == 1 else None
        if kind is None or not is_text(kind):
            raise no_column(path, column, describe_columns(schema))
        columns = find_kept(path, schema, keeping, ())
        for group in range(table.num_row_groups):
            for row in list_values(table, group, list(dict.fromkeys([column, *columns]))):
                yield os.fsencode(row[column] or ""), row
    except pa.ArrowException as error:
        raise UsageError(
            f"The list {spell(path)} cannot be read: it is not a whole Parquet file."
        ) from error


def no_column(path: str, column: str, columns: str) -> UsageError:
    """Return the error for a list without the named column."""
    return UsageError(
        f'{spell(path)} has no column "{column}" of paths. It has: {columns or "none"}. Name one '
        "with --column."
    )
