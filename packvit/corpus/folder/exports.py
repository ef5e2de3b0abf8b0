"""Files made from a finished job's parts for readers without Parquet. No torch.

    pooled.npy   [rows, D], of the dtype of pooled: a row for each input, in their order; NaN where
                 it is an error
    ids.jsonl    a line for each input, in the same order: its id and status

Both are derived from the parts. The manifest records their sha256, and a missing or damaged file is
made again without reading an image. Tokens and taps are in the parts alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np

from packvit.corpus import UsageError
from packvit.corpus.folder.layout import building
from packvit.corpus.folder.names import Names
from packvit.corpus.folder.parts import Outputs, read_part
from packvit.corpus.folder.resume import find_damage
from packvit.corpus.folder.stores import Folder

Format = Literal["parquet", "npy"]
FORMATS: tuple[Format, ...] = ("parquet", "npy")

Exports = dict[str, dict[str, Any]]  # bytes and sha256 by the file's path, as in the manifest


def check_format(name: str) -> None:
    """Refuse an unknown format."""
    if name not in FORMATS:
        raise UsageError(f'format is "{name}". Choose one of: {", ".join(FORMATS)}.')


def export(
    folder: Folder,
    names: Names,
    parts: Sequence[str],
    rows: int,
    outputs: Outputs,
    recorded: Mapping[str, Any],
) -> Exports:
    """Write the files that are missing or damaged; return the manifest's record of all.

    `parts` hold `rows` rows of these outputs together.

    Raises: WriteError if a file cannot be written.
    """
    makers: dict[str, Callable[[BinaryIO], None]] = {
        names.pooled: lambda file: write_pooled(file, folder, parts, rows, outputs),
        names.ids: lambda file: write_ids(file, folder, parts),
    }
    return {
        name: recorded[name]
        if name in recorded and find_damage(folder / name, **recorded[name]) is None
        else make(folder, name, write)
        for name, write in makers.items()
    }


def make(folder: Folder, name: str, write: Callable[[BinaryIO], None]) -> dict[str, Any]:
    """Write a file by `write` and rename it to `name`; return its size and digest."""
    path = folder / name
    with building(path, beside=folder) as temporary, temporary.open("w+b") as file:
        write(file)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": size, "sha256": digest}


def write_pooled(
    file: BinaryIO, folder: Folder, parts: Sequence[str], rows: int, outputs: Outputs
) -> None:
    """Write a NumPy file of all pooled vectors, part by part."""
    width, descr = outputs.vector_width, np.dtype(outputs.vector_dtype).newbyteorder("<").str
    header = {"descr": descr, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)
    for (pooled,) in read(folder, parts, ["pooled"]):
        valid = pooled.is_valid().to_numpy(zero_copy_only=False)
        vectors = np.full((len(pooled), width), np.nan, descr)
        vectors[valid] = pooled.drop_null().flatten().to_numpy().reshape(-1, width)
        file.write(vectors.tobytes())


def write_ids(file: BinaryIO, folder: Folder, parts: Sequence[str]) -> None:
    """Write a line of JSON for each input; names may hold any character, line breaks too."""
    for ids, statuses in read(folder, parts, ["id", "status"]):
        for name, status in zip(ids.to_pylist(), statuses.to_pylist(), strict=True):
            file.write(json.dumps({"id": name, "status": status}).encode() + b"\n")


def read(folder: Folder, parts: Sequence[str], columns: list[str]) -> Iterator[list[Any]]:
    """Yield these columns of each part, each as one array."""
    for part in parts:
        table = read_part(folder / part, columns)
        yield [table[name].combine_chunks() for name in columns]
