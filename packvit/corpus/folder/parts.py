"""A part of a feature folder: its rows, its columns, its bytes. No torch.

The same rows give the same bytes. A flipped bit is detected by readers that verify page checksums
 (in pyarrow: `page_checksum_verification=True`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from packvit.corpus.folder.rows import Row

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
        return cls(config["width"], lists, manifest["dtype_out"], pooled, projected, kind)

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
            ]
        )


def build_table(
    outputs: Outputs,
    rows: Sequence[Row],
    features: Mapping[str, np.ndarray],
    lists: Mapping[str, Sequence[np.ndarray | None]],
) -> pa.Table:
    """Return the table of a part: features are null wherever a row is an error.

    Shapes: N rows; features [N, D] for each of `outputs.vectors`, of its dtype, ignored where a row
    is an error; lists N arrays [tokens, D] under each name, None where a row is an error.
    """
    schema = outputs.schema
    bad = pa.array([row.status != "ok" for row in rows])
    columns: list[pa.Array] = [
        pa.array([getattr(row, field.name) for row in rows], schema.field(field.name).type)
        for field in fields(Row)
    ]
    for name in outputs.vectors:
        kept = np.where(bad.to_numpy(False)[:, None], features[name].dtype.type(0), features[name])
        columns.append(vectors(kept, schema, name, bad))
    for name in outputs.lists:
        kept = [array for array in lists[name] if array is not None]
        sizes = [0 if array is None else len(array) for array in lists[name]]
        values = np.concatenate([np.empty((0, outputs.width), outputs.dtype_out), *kept])
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        inner = vectors(values, schema, name)
        columns.append(
            pa.ListArray.from_arrays(offsets, inner, type=schema.field(name).type, mask=bad)
        )
    return pa.Table.from_arrays(columns, schema=schema)


def vectors(
    values: np.ndarray, schema: pa.Schema, name: str, mask: pa.Array | None = None
) -> pa.FixedSizeListArray:
    """Return the rows of `values` [N, D] as vectors of the type of column `name`."""
    kind = schema.field(name).type
    if not isinstance(kind, pa.FixedSizeListType):
        kind = kind.value_type
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)


def replace_rows(old: pa.Table, new: pa.Table, places: Sequence[int]) -> pa.Table:
    """Return a part's table with the rows at `places` replaced by those of `new`."""
    order = np.arange(old.num_rows)
    order[np.asarray(places, np.int64)] = old.num_rows + np.arange(new.num_rows)
    both = pa.concat_tables([old.cast(new.schema), new]).combine_chunks()
    return both.take(pa.array(order)).combine_chunks()


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return a part, or columns of it, verifying every page's checksum.

    Raises: OSError or pyarrow.ArrowException if it cannot be read as a part.
    """
    with pa.OSFile(os.fsencode(path)) as file:  # given a str, pyarrow takes only UTF-8 paths
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def encode_parquet(table: pa.Table) -> pa.Buffer:
    """Return a part's bytes: one row group, a checksum on every page.

    Text and sizes are compressed with zstd. Features are not: on float16 noise zstd saves 8 % and
    takes 2.5 times as long to write.
    """
    plain = [field.name for field in fields(Row)]
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
