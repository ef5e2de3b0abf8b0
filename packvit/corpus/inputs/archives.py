"""List the images in a Parquet file: the rows of its image column. No torch.

Nothing is unpacked: an input records the row group and row. The readable rows of a damaged file are
listed, and the damage is reported, since photographs may be missing.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from packvit.corpus import UsageError
from packvit.corpus.inputs import limits
from packvit.corpus.inputs.addresses import spell
from packvit.corpus.inputs.cells import Cell, fit, is_bytes, is_text
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.pages import check_footer
from packvit.corpus.inputs.reader import open_source, unreadable
from packvit.corpus.inputs.tars import ArchiveEntry, find_length
from packvit.images.errors import ImageError

NAMES = 4096  # that are read at once


def list_parquet(path: str, column: str, keeping: Keeping) -> Iterator[ArchiveEntry | None]:
    """Yield the rows of a Parquet file: path if there is one, number, cell, and what is kept.

    Numbers have leading zeros, so that their bytes sort in row order. A row without a path also
    yields None, which says that paths cannot name the rows.

    Raises: UsageError if no such column holds bytes, or one to keep nothing of the kinds that are
    kept; ImageError truncated if it is damaged, or what opening it raises.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_source(path) as file, unreadable():
        check_footer(file)
        try:
            table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            schema = table.schema_arrow
            kind = schema.field(column).type if schema.names.count(column) == 1 else None
            fields = {}
            if kind is not None and pa.types.is_struct(kind):
                fields = {field.name: field.type for field in kind}
            held = "bytes" if is_bytes(fields.get("bytes")) else "path"
            found = fields.get(held) if fields else kind
            if not (is_bytes(found) or is_text(found)):
                raise UsageError(
                    f'{spell(path)} has no column "{column}" that holds the bytes of images, their '
                    f"paths, or both. It has: {describe_columns(schema)}. Name one with "
                    "--image-column; for a list of paths, give the file with --list."
                )
            place = f"{column}.{held}" if fields else column
            columns = find_kept(path, schema, keeping, (column,))
            check_counts(table.metadata, find_length(file))
            digits = len(str(table.metadata.num_rows - 1))
            number = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                names = list_names(table, group, column) if "path" in fields else None
                values = list_values(table, group, columns) if columns else None
                for row in range(rows):
                    text = f"{number:0{digits}}".encode()
                    name = next(names) if names else None
                    if not name:
                        yield None
                    where = f"row {number} of {spell(path)}"
                    kept = keeping.encode(next(values), where) if values else None
                    yield ArchiveEntry(name or text, text, Cell(group, row, place), kept=kept)
                    number += 1
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise ImageError("truncated", "list") from error


def check_counts(facts: Any, length: int) -> None:
    """Refuse a table whose footer contradicts itself, or claims more rows than the file can hold.

    Raises: ImageError truncated.
    """
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    rows = [group.num_rows for group in groups]
    most = max(limits.FEW_ROWS, length * limits.MOST_ROWS)
    agree = min(rows, default=0) >= 0 and sum(rows) == facts.num_rows <= most
    for group in groups if agree else ():
        for number in range(group.num_columns):
            once = facts.schema.column(number).max_repetition_level == 0
            agree = agree and (not once or group.column(number).num_values == group.num_rows)
    if not agree:
        raise ImageError("truncated", "list")


def list_names(table: Any, group: int, column: str) -> Iterator[bytes]:
    """Yield the paths in a row group, empty where there is none."""
    columns = [f"{column}.path"]
    rows, _ = fit(table.metadata.row_group(group), columns, NAMES)
    batches = table.iter_batches(rows, row_groups=[group], columns=columns)
    for batch in batches:
        for name in batch.column(0).field(0).to_pylist():
            if name and len(name) > limits.MOST_LINE:
                raise ImageError("truncated", "list")
            yield os.fsencode(spell(name or ""))


def find_kept(path: str, schema: Any, keeping: Keeping, others: Sequence[str]) -> list[str]:
    """Return which columns to keep a table has; `others` are those of images or paths.

    Raises: UsageError for one of a kind that is not kept.
    """
    keeping.meet(name for name in schema.names if name not in others)
    columns = [name for name in keeping.names if schema.names.count(name) == 1]
    for name in columns:
        if not is_kept(schema.field(name).type):
            raise UsageError(
                f'{spell(path)} has {schema.field(name).type} in "{name}", which is not kept: '
                "text, numbers and booleans are, and lists and structs of these as JSON."
            )
    return columns


def is_kept(kind: Any) -> bool:
    """Return whether values of an Arrow type are JSON."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return is_kept(kind.value_type)
    if types.is_struct(kind):
        return all(is_kept(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_kept(kind.value_type)
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, is_text)
    return any(each(kind) for each in plain)


def list_values(table: Any, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of columns in the rows of a row group."""
    facts = table.metadata.row_group(group)
    paths = [facts.column(number).path_in_schema for number in range(facts.num_columns)]
    leaves = [path for path in paths if any(path == c or path.startswith(f"{c}.") for c in columns)]
    rows, _ = fit(facts, leaves, NAMES)
    for batch in table.iter_batches(rows, row_groups=[group], columns=list(columns)):
        yield from batch.to_pylist()


def describe_columns(schema: Any) -> str:
    """Return the names and types of columns, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
