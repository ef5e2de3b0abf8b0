"""The feature folder: what a job leaves behind, and how it gets there whole. No torch.

    manifest.json       what was run on what, its fingerprint, and the counts once it is complete
    commits.jsonl       one line for each part that is whole: rows, errors, tokens, bytes, sha256
    certificate.json    how the encoder was verified, where that was asked for
    part-00000.parquet  one row for each input, in the order of the inputs
    pooled.npy, ids.jsonl   made of the parts once they are all there, where that was asked for

A part is written under a temporary name, flushed, renamed, and only then entered in the log, so
readers trust the log and not the listing. Lines stand in the order of the parts. Nothing that is
written depends on the clock: the same rows give the same bytes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.parts import encode_parquet

MANIFEST, COMMITS, LOCK = "manifest.json", "commits.jsonl", ".lock"
CERTIFICATE = "certificate.json"
POOLED, IDS = "pooled.npy", "ids.jsonl"
SPOOL = "shards"  # only ever under its temporary name: what waits for workers on other hosts
FORMAT = "packvit features 1"
CHECKSUM = "manifest_sha256"
PART = re.compile(r"part-(\d{5,})\.parquet")
TEMPORARY = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.tmp")  # with what `attempt` may be
COUNTED = ("status", "frames", "rows", "columns")


@dataclass(frozen=True, slots=True)
class Commit:
    """A line of the log: a part that is whole on the disk."""

    part: str  # the file's name
    rows: int
    errors: int
    tokens: int
    bytes: int
    sha256: str
    halved: int = 0  # packs that were split for want of memory; a line says it where there are any


@dataclass(frozen=True, slots=True)
class Staged:
    """A part that is whole on the disk, but under a temporary name and in no log yet."""

    entry: Commit
    file: str  # its temporary name


def part_name(number: int) -> str:
    """Return what the file of part `number` is called."""
    return f"part-{number:05d}.parquet"


def part_number(name: str) -> int | None:
    """Return the number of the part that a file called `name` would be, or None if it is none."""
    found = PART.fullmatch(name)
    return int(found[1]) if found and part_name(int(found[1])) == name else None


def commit(
    folder: Path, number: int, table: pa.Table, *, mends: bool = False, halved: int = 0
) -> Commit:
    """Write part `number` and enter it in the log; on failure leave neither.

    `mends` says that the log has later parts already: then all of it is replaced in one step, since
    its lines stand in the order of the parts.

    Raises: WriteError if the disk does not take it.
    """
    return enter(folder, stage(folder, number, table, halved=halved), mends=mends)


def stage(
    folder: Path, number: int, table: pa.Table, *, attempt: str = "", halved: int = 0
) -> Staged:
    """Write part `number` under a temporary name, flushed; on failure leave nothing.

    `attempt` makes the name one's own, where another may still be writing the same part.

    Raises: WriteError if the disk does not take it.
    """
    part = folder / part_name(number)
    data = encode_parquet(table)
    facts = zip(*(table[name].to_pylist() for name in COUNTED), strict=True)
    tokens = [frames * rows * columns for status, frames, rows, columns in facts if status == "ok"]
    entry = Commit(
        part=part.name,
        rows=table.num_rows,
        errors=table.num_rows - len(tokens),
        tokens=sum(tokens),
        bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        halved=halved,
    )
    temporary = folder / temporary_name(part.name, attempt)
    with writing(part):
        write_flushed(temporary, data)
    return Staged(entry, temporary.name)


def enter(folder: Path, staged: Staged, *, mends: bool = False) -> Commit:
    """Give a staged part its name and enter it in the log; on failure leave neither.

    Raises: WriteError if the disk does not take it.
    """
    part = folder / staged.entry.part
    try:
        with writing(part):
            os.replace(folder / staged.file, part)
            sync_names(folder)
        if mends:
            write_commits(folder, [*read_commits(folder), staged.entry])
        else:
            append_line(folder / COMMITS, encode_commit(staged.entry))
    except WriteError:
        for path in (folder / staged.file, part):
            with suppress(OSError):  # a folder of that name, for example, which is not ours
                path.unlink()
        raise
    return staged.entry


def encode_commit(entry: Commit) -> str:
    """Return the line of the log that says `entry`, without its end."""
    values = asdict(entry)
    if not entry.halved:
        del values["halved"]
    return json.dumps(values)


def decode_commit(line: bytes) -> Commit | None:
    """Return what a line of the log says, or None if it is not exactly such a line."""
    try:
        values = json.loads(line)
        entry = Commit(**values)
    except (ValueError, TypeError):
        return None
    kinds = {"part": str, "sha256": str}
    right = all(type(getattr(entry, f.name)) is kinds.get(f.name, int) for f in fields(Commit))
    return entry if right and line == encode_commit(entry).encode() + b"\n" else None


def read_log(folder: Path) -> tuple[bytes, ...]:
    """Return the lines of the log of `folder`, each with its end; only the last may have none.

    Raises: WriteError if it is there and can't be read: a job could not tell what it may keep.
    """
    try:
        with reading(folder / COMMITS):
            data = (folder / COMMITS).read_bytes()
    except FileNotFoundError:
        return ()
    *lines, rest = data.split(b"\n")
    return (*(line + b"\n" for line in lines), *([rest] if rest else []))


def read_commits(folder: Path) -> tuple[Commit, ...]:
    """Return what the log of `folder` says is whole; a line cut short or damaged does not count."""
    found = (decode_commit(line) for line in read_log(folder))
    return tuple(entry for entry in found if entry)


def write_commits(folder: Path, entries: Sequence[Commit]) -> None:
    """Put a log of `entries`, in the order of their parts, in the place of the one before."""
    ordered = sorted(entries, key=lambda entry: part_number(entry.part) or 0)
    text = "".join(encode_commit(entry) + "\n" for entry in ordered)
    write_whole(folder / COMMITS, text.encode())


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest's bytes: a checksum of all entries is its last."""
    checksum = fingerprint(manifest)
    return (json.dumps({**manifest, CHECKSUM: checksum}, indent=2) + "\n").encode()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put `manifest` in the place of the one before, if any, in one step."""
    write_whole(folder / MANIFEST, encode_manifest(manifest))


def encode_certificate(certificate: Mapping[str, Any]) -> bytes:
    """Return the bytes of certificate.json."""
    return (json.dumps(certificate, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder` without its checksum, or None if none can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict):
        return None
    return {name: value for name, value in manifest.items() if name != CHECKSUM}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the digest of all that decides what numbers a job writes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder` where it is not there yet, and hold it against other jobs.

    The system lets go of the lock however the process ends. The file stays: were it removed, one
    job could hold the old one while another holds the new.

    Raises: UsageError if another job holds it; WriteError if it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            with writing(folder / LOCK):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except WriteError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise UsageError(
                f"Another job is writing to {folder}. Wait for it, or choose another folder."
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a WriteError that says it in a sentence."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} could not be written: {error.strerror}. Mend that, then start the job again: "
            "it goes on after what commits.jsonl lists."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a WriteError that says it, but for what is not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} could not be read: {error.strerror or error}. Mend that, then start the job "
            "again."
        ) from error


def temporary_name(name: str, attempt: str = "") -> str:
    """Return what the file called `name` is called while it is written, at one of many attempts."""
    return f".{name}.{attempt}.tmp" if attempt else f".{name}.tmp"


def write_whole(path: Path, data: bytes | pa.Buffer) -> None:
    """Put `data` at `path` so that at no moment less than all of it stands under that name."""
    temporary = path.with_name(temporary_name(path.name))
    with writing(path):
        try:
            write_flushed(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_names(path.parent)


def write_flushed(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a file and wait until the disk has it; leave nothing where the disk does not take it.

    Raises: OSError.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of `path` and flush it; on failure take back what was added."""
    data = line.encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) < len(data):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
            sync_names(path.parent)
        except OSError:
            file.truncate(before)
            raise


def sync_names(folder: Path) -> None:
    """Wait until the disk knows the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
