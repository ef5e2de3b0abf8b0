"""A part of a feature folder: its rows, its columns, its bytes. No torch.

The same rows give the same bytes. A flipped bit is detected by readers that verify page checksums
 (in pyarrow: `page_checksum_verification=True`).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from packvit.corpus import UsageError
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import Folder, StorePath
from packvit.corpus.inputs.kept import KINDS, Kind

# Columns of ours, with whatever outputs: a job with others can keep the same columns.
OURS = re.compile(
    "|".join([*(f.name for f in fields(Row)), "pooled", "projected", "tokens", r"tap_.*"])
)
DtypeOut = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Which features a part holds: `vectors`, and a list of [D] for each of `lists`."""

    width: int  # D
    lists: tuple[str, ...] = ()  # tokens, tap_11 ...
    dtype_out: DtypeOut = "float16"  # of the lists
    pooled: int | None = None  # the width of pooled, where it is not D
    projected: int | None = None  # the width of `projected`, where there is such a column
    vector_dtype: DtypeOut = "float32"
    keep: tuple[tuple[str, Kind], ...] = ()  # columns that came with the inputs, and their types

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "Outputs":
        """Return what the parts of a folder with this manifest hold."""
        config, lists = manifest["config"], tuple(manifest["lists"])
        merger, summary = config.get("merger"), config.get("summary")
        pooled = merger["width"] if merger else None
        if summary:
            pooled = len(summary["chosen"]) * config["width"]
        shared = manifest.get("text_space") == "projected"
        projected = config["projection"] if shared else None
        kind = manifest.get("vector_dtype", "float32")
        keep = tuple((name, kind) for name, kind in manifest.get("keep", ()))
        width, dtype_out = config["width"], manifest["dtype_out"]
        return cls(width, lists, dtype_out, pooled, projected, kind, keep)

    @property
    def vector_width(self) -> int:
        """The width of pooled."""
        return self.pooled or self.width

    @property
    def vectors(self) -> dict[str, int]:
        """The columns of one vector a row, and their widths."""
        shared = {"projected": self.projected} if self.projected else {}
        return {"pooled": self.vector_width, **shared}

    @property
    def schema(self) -> pa.Schema:
        """The columns of a part and their types."""
        element = pa.field("element", pa.type_for_alias(self.vector_dtype))
        vector = pa.list_(pa.field("element", pa.type_for_alias(self.dtype_out)), self.width)
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("status", pa.string(), nullable=False),
                *(pa.field(name, pa.string()) for name in ("stage", "note", "sha256")),
                *(pa.field(name, pa.int32()) for name in ("width", "height")),
                *(pa.field(name, pa.int32()) for name in ("frames", "rows", "columns")),
                *(pa.field(n, pa.list_(element, width)) for n, width in self.vectors.items()),
                *(pa.field(n, pa.list_(pa.field("element", vector))) for n in self.lists),
                *(pa.field(name, pa.type_for_alias(kind)) for name, kind in self.keep),
            ]
        )


def build_table(
    outputs: Outputs,
    rows: Sequence[Row],
    features: Mapping[str, np.ndarray],
    lists: Mapping[str, Sequence[np.ndarray | None]],
    kept: Sequence[str | None] = (),
) -> pa.Table:
    """Return the table of a part: features are null wherever a row is an error.

    `kept` is a JSON array for each row of the values of `outputs.keep`.

    Shapes: N rows; features [N, D] for each of `outputs.vectors`, of its dtype, ignored where a row
    is an error; lists N arrays [tokens, D] under each name, None where a row is an error.
    """
    schema = outputs.schema
    errors = np.array([row.status != "ok" for row in rows], bool)
    given = bits(~errors)
    columns: list[pa.Array] = [
        make_column([getattr(row, field.name) for row in rows], schema.field(field.name).type)
        for field in fields(Row)
    ]
    for name in outputs.vectors:
        filled = np.where(errors[:, None], features[name].dtype.type(0), features[name])
        columns.append(vectors(filled, schema, name, given))
    for name in outputs.lists:
        arrays = [array for array in lists[name] if array is not None]
        sizes = [0 if array is None else len(array) for array in lists[name]]
        values = np.concatenate([np.empty((0, outputs.width), outputs.dtype_out), *arrays])
        offsets = pa.py_buffer(np.cumsum([0, *sizes]).astype(np.int32))
        inner, kind = vectors(values, schema, name), schema.field(name).type
        columns.append(pa.Array.from_buffers(kind, len(rows), [given, offsets], children=[inner]))
    if outputs.keep:
        values = [json.loads(text or "") for text in kept]
        for place, (_, kind) in enumerate(outputs.keep):
            columns.append(pa.array([row[place] for row in values], pa.type_for_alias(kind)))
    return pa.Table.from_arrays(columns, schema=schema)


def vectors(
    values: np.ndarray, schema: pa.Schema, name: str, given: pa.Buffer | None = None
) -> pa.Array:
    """Return the rows of `values` [N, D] as vectors of the type of column `name`.

    `given` has the bits of the rows that are not null.
    """
    kind = schema.field(name).type
    if not isinstance(kind, pa.FixedSizeListType):
        kind = kind.value_type
    flat = make_numbers(values.reshape(-1), kind.value_type)
    return pa.Array.from_buffers(kind, len(values), [given], children=[flat])


def make_column(values: Sequence[str | int | None], kind: pa.DataType) -> pa.Array:
    """Return texts or whole numbers as `pa.array` does, which takes 0.5 s the first time.

    It imports pandas, where that is installed, to see whether `values` are pandas' own.
    """
    given = bits(np.array([value is not None for value in values], bool))
    if kind != pa.string():
        return make_numbers(np.array([value or 0 for value in values]), kind, given)
    texts = [b"" if value is None else str(value).encode() for value in values]
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    buffers = [given, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def make_numbers(values: np.ndarray, kind: pa.DataType, given: pa.Buffer | None = None) -> pa.Array:
    """Return numbers as a column without a copy where they have its type; `given` has their bits.

    Shapes: values [N].
    """
    found = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [given, pa.py_buffer(found)])


def bits(flags: np.ndarray) -> pa.Buffer:
    """Return truth values as Arrow keeps them, eight in a byte.

    Source: the Arrow columnar format, "Validity bitmaps".
    """
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def replace_rows(old: pa.Table, new: pa.Table, places: Sequence[int]) -> pa.Table:
    """Return a part's table with the rows at `places` replaced by those of `new`."""
    order = np.arange(old.num_rows)
    order[np.asarray(places, np.int64)] = old.num_rows + np.arange(new.num_rows)
    both = pa.concat_tables([old.cast(new.schema), new]).combine_chunks()
    return both.take(pa.array(order)).combine_chunks()


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column holds features."""
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def read_part(path: Folder, columns: list[str] | None = None) -> pa.Table:
    """Return a part, or columns of it, verifying every page's checksum.

    Raises: OSError or pyarrow.ArrowException if it cannot be read as a part.
    """
    with open_part(path) as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def open_part(path: Folder) -> Any:
    """Return a part's file, for pyarrow, which takes paths only if they are UTF-8."""
    return path.open() if isinstance(path, StorePath) else pa.OSFile(os.fsencode(path))


def encode_parquet(table: pa.Table) -> pa.Buffer:
    """Return a part's bytes: one row group, a checksum on every page.

    Text and numbers are compressed with zstd. Features are not: on float16 noise zstd saves 8 % and
    takes 2.5 times as long to write.
    """
    plain = [field.name for field in table.schema if not is_list(field.type)]
    sink = pa.BufferOutputStream()
    # pyarrow's stubs lack the choice by column, hence the ignored errors of pyright.
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression=dict.fromkeys(plain, "zstd"),  # pyright: ignore[reportArgumentType]
        use_dictionary=["status", "stage", "note"],  # pyright: ignore[reportArgumentType]
        write_statistics=plain,  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
    )
    return sink.getvalue()


def check_keep(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of columns to keep, checked against those that a part has anyway.

    Raises: UsageError.
    """
    if isinstance(names, str):
        raise UsageError(f'keep is "{names}", but must be a list of names of columns.')
    for place, name in enumerate(names):
        if not name or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UsageError(f"keep names {json.dumps(name)}, which is no name of a column.")
        if OURS.fullmatch(name):
            raise UsageError(
                f'keep names "{name}", which is a column of every feature folder. Give it another '
                "name where it comes from."
            )
        if name in names[:place]:
            raise UsageError(f'keep names "{name}" twice.')
    return tuple(names)


def encode_kept(table: pa.Table, manifest: Mapping[str, Any]) -> list[str]:
    """Return the JSON arrays that the kept columns of a part were made of."""
    columns = [table[name].to_pylist() for name, _ in manifest.get("keep", ())]
    return [json.dumps(list(row)) for row in zip(*columns, strict=True)]


def find_keep_flaw(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest's record of columns that were kept, or None."""
    keep = manifest.get("keep", [])
    pairs = isinstance(keep, list) and all(isinstance(p, list) and len(p) == 2 for p in keep)
    if not pairs or not all(isinstance(name, str) and kind in KINDS for name, kind in keep):
        return "has keep that is not a list of names and types."
    try:
        check_keep([name for name, _ in keep])
    except UsageError:
        return "has keep with a name that a kept column cannot have."
    return None
