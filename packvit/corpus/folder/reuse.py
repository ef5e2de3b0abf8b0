"""Take over the rows of other feature folders whose photographs have the same bytes. No torch.

A row is taken over if its sha256 is equal and all that decides its features is. Rows that are
errors never are.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packvit.atomic import temporary_name
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.known import Place, Reuse, Trusted, stat_input, write_index
from packvit.corpus.folder.layout import put, read_commits, writing
from packvit.corpus.folder.names import KNOWN, MTIMES, part_number
from packvit.corpus.folder.opening import open_own
from packvit.corpus.folder.parts import read_part
from packvit.corpus.folder.reader import damaged, read_whole_manifest
from packvit.corpus.folder.resume import differences, find_damage
from packvit.corpus.folder.stores import Folder, StorePath
from packvit.corpus.inputs.listing import Listing

# Settings that a row does not depend on, under `invariant`; without it, nothing is promised.
BESIDE_ROWS = ("revision", "token_budget", "plan_version", "rows_per_part", "versions", "keep")
NOT_IN_NUMBERS = ("pyarrow",)  # of the versions: parts are written again
FRESH = 2 * 10**9  # nanoseconds: a file changed this recently may change again unnoticed


@dataclass(frozen=True, slots=True)
class Source:
    """A folder whose rows may be taken over."""

    folder: Folder
    manifest: Mapping[str, Any]


def open_source(folder: Folder, described: Mapping[str, Any], *, across_versions: bool) -> Source:
    """Return a folder whose rows a job with these settings may take over.

    Raises: UsageError if it is not a feature folder, or has other settings.
    """
    manifest = read_whole_manifest(folder, f"reuse names {folder}, which is")
    wanted = json.loads(json.dumps(described))
    lines = differences(settings(manifest, wanted), settings(wanted, wanted))
    if lines:
        raise UsageError(
            f"reuse names {folder}, whose rows have other features than this job writes. What "
            "differs, its -> yours:\n" + "\n".join(f"  {line}" for line in lines)
        )
    if not across_versions and (lines := other_versions(manifest, wanted)):
        raise UsageError(
            f"reuse names {folder}, whose rows were written by other versions: {', '.join(lines)}. "
            "Ask for `reuse_across_versions` to take them over all the same."
        )
    return Source(folder, manifest)


def settings(manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a row's features."""
    return {name: manifest.get(name) for name in wanted if name not in BESIDE_ROWS}


def other_versions(manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return a line for each package whose version differs, its -> ours, and of what it took."""
    old, new = (
        {name: version for name, version in of["versions"].items() if name not in NOT_IN_NUMBERS}
        for of in (manifest, wanted)
    )
    taken = manifest.get("reused", {}).get("across_versions", False)
    return differences(old, new) + (["it took over rows of other versions itself"] if taken else [])


def describe_reuse(
    sources: Sequence[Source], described: Mapping[str, Any], device_name: str, *, trust_mtime: bool
) -> dict[str, Any] | None:
    """Return what the manifest says of rows taken over; None if a fresh job's bytes are promised.

    They are if the encoder is invariant, and the folders are of the same versions and device.
    """
    wanted = json.loads(json.dumps(described))
    across = any(other_versions(source.manifest, wanted) for source in sources)
    exact = bool(described["invariant"]) and not across and not trust_mtime
    for source in sources:
        exact &= source.manifest.get("device_names") == [device_name]
        exact &= "reused" not in source.manifest
    if exact or not sources:
        return None
    fingerprints = sorted({source.manifest["fingerprint"] for source in sources})
    return {"fingerprints": fingerprints, "across_versions": across, "trust_mtime": trust_mtime}


def join_reuse(entries: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return one entry of the manifest for rows taken over several times, or an empty one."""
    said = [entry for entry in entries if entry]
    if not said:
        return {}
    joined = {
        "fingerprints": sorted({each for entry in said for each in entry["fingerprints"]}),
        "across_versions": any(entry["across_versions"] for entry in said),
        "trust_mtime": any(entry["trust_mtime"] for entry in said),
    }
    return {"reused": joined}


@dataclass(frozen=True, slots=True)
class Reusing:
    """What a job takes over, and what its manifest says of that."""

    sources: tuple[Source, ...] = ()
    entry: Mapping[str, Any] | None = None
    trust_mtime: bool = False

    def reuse(self, folder: Folder) -> Reuse | None:
        """Return what embedders of a job in `folder` need to know."""
        if not self.sources:
            return None
        names = tuple(str(source.folder.absolute()) for source in self.sources)
        prints = tuple(str(source.manifest["fingerprint"]) for source in self.sources)
        return Reuse(str(index_path(folder)), names, prints)


def index_path(folder: Folder) -> Path:
    """Return the path of the index of a job in `folder`; of one in a store it is on this host."""
    local = Path(scratch().name) if isinstance(folder, StorePath) else folder.absolute()
    return local / temporary_name(KNOWN)


@lru_cache
def scratch() -> TemporaryDirectory[str]:
    """Return a folder that is removed at the end of this process."""
    return TemporaryDirectory(prefix="packvit-")


@contextmanager
def indexed(folder: Folder, reusing: Reusing) -> Iterator[None]:
    """Keep the index of the rows to take over in a job's folder, if there are any.

    Raises: UsageError if a part is damaged; WriteError.
    """
    if not reusing.sources:
        yield
        return
    path, sources = index_path(folder), reusing.sources
    read = sources if reusing.trust_mtime else ()
    trusted = (file for source in read for file in read_trusted(source))
    try:
        with writing(path):
            write_index(path, list_rows(sources), trusted)
        yield
    except sqlite3.Error as error:
        raise WriteError(f"{path} could not be written or read: {error}.") from error
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def list_rows(sources: Sequence[Source]) -> Iterator[tuple[str, Place]]:
    """Yield the sha256 and the place of all rows that are ok."""
    for number, source in enumerate(sources):
        for part in read_sorted(source):
            shas, statuses = read_columns(source, part, "sha256", "status")
            for row, (sha256, status) in enumerate(zip(shas, statuses, strict=True)):
                if status == "ok":
                    yield sha256, Place(number, part, row)


def read_sorted(source: Source) -> list[str]:
    """Return the paths of a folder's parts below it, in order."""
    parts = [entry.part for entry in read_commits(source.folder)]
    return sorted(parts, key=lambda part: part_number(part) or 0)


def read_columns(source: Source, part: str, *names: str) -> list[list[Any]]:
    """Return columns of a part as lists.

    Raises: UsageError if it is damaged.
    """
    try:
        table = read_part(source.folder / part, list(names))
    except (OSError, pa.ArrowException) as error:
        raise damaged(source.folder, part) from error
    return [table[name].to_pylist() for name in names]


def write_mtimes(
    folder: Folder, listing: Listing, rows_per_part: int, written: Container[int]
) -> dict[str, Any]:
    """Write the sizes and times of change of the inputs, before they are read.

    They are null for parts that are `written`, whose inputs were read before, and for files that
    have just changed. Returns the size and sha256 of the file, for the manifest.

    Raises: WriteError.
    """
    now = time.time_ns()
    found = [
        None if place // rows_per_part in written else stat_input(source)
        for place, source in enumerate(listing)
    ]
    found = [None if each is None or each[1] > now - FRESH else each for each in found]
    table = pa.table(
        {
            "size": pa.array([each and each[0] for each in found], pa.int64()),
            "mtime_ns": pa.array([each and each[1] for each in found], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    put(folder / MTIMES, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def has_mtimes(folder: Folder, manifest: Mapping[str, Any]) -> bool:
    """Return whether a folder has the times that its manifest names."""
    entry = manifest.get("mtimes")
    return entry is not None and find_damage(folder / MTIMES, **entry) is None


def read_trusted(source: Source) -> Iterator[Trusted]:
    """Yield the files of rows that are ok, as they were when they were read."""
    if not has_mtimes(source.folder, source.manifest):
        return
    with open_own(source.folder / MTIMES) as file:
        table = pq.read_table(file)
    sizes, times = (table[name].to_pylist() for name in ("size", "mtime_ns"))
    for part in read_sorted(source):
        first = (part_number(part) or 0) * source.manifest["rows_per_part"]
        ids, shas, statuses = read_columns(source, part, "id", "sha256", "status")
        for row, (name, sha256, status) in enumerate(zip(ids, shas, statuses, strict=True)):
            size, mtime = sizes[first + row], times[first + row]
            if status == "ok" and mtime is not None:
                yield Trusted(name, size, mtime, sha256)
