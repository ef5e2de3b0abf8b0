"""The commit of a part: what the log says of it, a line for each. No torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

COUNTED = ("status", "frames", "rows", "columns")


@dataclass(frozen=True, slots=True)
class Commit:
    """A line of the log: a part that is on disk."""

    part: str  # the file's path below the folder
    rows: int
    errors: int
    tokens: int
    bytes: int
    sha256: str
    halved: int = 0  # packs that were split to fit in memory; omitted from the line if 0


@dataclass(frozen=True, slots=True)
class Staged:
    """A part that is written, under a temporary name where there are such, and not committed."""

    entry: Commit
    file: str  # its temporary name


def describe_part(part: str, table: pa.Table, data: pa.Buffer, halved: int) -> Commit:
    """Return the commit of a part that is to be written as `data`."""
    facts = zip(*(table[name].to_pylist() for name in COUNTED), strict=True)
    tokens = [frames * rows * columns for status, frames, rows, columns in facts if status == "ok"]
    return Commit(
        part=part,
        rows=table.num_rows,
        errors=table.num_rows - len(tokens),
        tokens=sum(tokens),
        bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        halved=halved,
    )


def encode_commit(entry: Commit) -> str:
    """Return the line of the log for `entry`, without its line break."""
    values = asdict(entry)
    if not entry.halved:
        del values["halved"]
    return json.dumps(values)


def decode_commit(line: bytes) -> Commit | None:
    """Return the entry of a line of the log, or None if the line is damaged."""
    try:
        values = json.loads(line)
        entry = Commit(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {"part": str, "sha256": str}
    right = all(type(getattr(entry, f.name)) is kinds.get(f.name, int) for f in fields(Commit))
    return entry if right and line == encode_commit(entry).encode() + b"\n" else None


def describe_change(size: int, committed: int) -> str | None:
    """Return how many bytes there are of how many, as the end of a sentence, or None if all."""
    return None if size == committed else f"has {size:,} bytes, but {committed:,} were committed"
