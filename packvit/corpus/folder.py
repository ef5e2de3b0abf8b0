"""The feature folder: what a job leaves behind, and how it gets there whole. No torch.

    manifest.json       what was run on what, its fingerprint, and the counts once it is complete
    commits.jsonl       one line for each part that is whole: rows, errors, tokens, bytes, sha256
    certificate.json    how the encoder was verified, where that was asked for
    part-00000.parquet  one row for each input, in the order of the inputs

A part is written under a temporary name, flushed, renamed, and only then entered in the log, so
readers trust the log and not the listing. Nothing that is written depends on the clock: the same
rows give the same bytes.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from packvit.corpus import WriteError, WrongUse
from packvit.corpus.parts import encode_parquet

MANIFEST, COMMITS, LOCK = "manifest.json", "commits.jsonl", ".lock"
CERTIFICATE = "certificate.json"
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


def commit(folder: Path, number: int, table: pa.Table) -> Commit:
    """Write part `number` and enter it in the log; on failure leave neither.

    Raises: WriteError if the disk does not take it.
    """
    part = folder / f"part-{number:05d}.parquet"
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
    )
    try:
        write_whole(part, data)
        append_line(folder / COMMITS, json.dumps(asdict(entry)))
    except WriteError:
        part.unlink(missing_ok=True)
        raise
    return entry


def read_commits(folder: Path) -> tuple[Commit, ...]:
    """Return what the log of `folder` says is whole; a last line cut short does not count."""
    try:
        text = (folder / COMMITS).read_text("utf-8")
    except FileNotFoundError:
        return ()
    lines = text.splitlines(keepends=True)
    return tuple(Commit(**json.loads(line)) for line in lines if line.endswith("\n"))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put `manifest` in the place of the one before, if any, in one step."""
    text = json.dumps(manifest, indent=2) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def write_certificate(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Put how the encoder was verified beside the manifest."""
    write_whole(folder / CERTIFICATE, (json.dumps(certificate, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, or None if there is none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the digest of all that decides what numbers a job writes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises: WrongUse saying what it holds.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise WrongUse(f"{folder} is not a folder. Choose another one for the features.")
    with writing(folder):
        held = sorted(set(os.listdir(folder)) - {LOCK})
    if MANIFEST in held:
        manifest = read_manifest(folder) or {}
        rows = sum(entry.rows for entry in read_commits(folder))
        raise WrongUse(
            f"{folder} already holds features of {manifest.get('model', 'an unknown model')} for "
            f"{rows} of {manifest.get('inputs', 'an unknown number of')} inputs. "
            "Choose another folder."
        )
    if held:
        raise WrongUse(
            f"{folder} is not empty: it holds {held[0]} and {len(held) - 1} other files. "
            "Choose a new or an empty folder."
        )


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder` where it is not there yet, and hold it against other jobs.

    The system lets go of the lock however the process ends. The file stays: were it removed, one
    job could hold the old one while another holds the new.

    Raises: WrongUse if another job holds it, or if it holds anything; WriteError if it cannot be
    made.
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
            raise WrongUse(
                f"Another job is writing to {folder}. Wait for it, or choose another folder."
            ) from error
        check_free(folder)
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
            f"{path} could not be written: {error.strerror}. Mend that, then start the job again "
            "with another folder; what commits.jsonl lists is whole."
        ) from error


def write_whole(path: Path, data: bytes | pa.Buffer) -> None:
    """Put `data` at `path` so that at no moment less than all of it stands under that name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_names(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of `path` and flush it; on failure take back what was added."""
    data = line.encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) < len(data):  # a disk that fills up takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Wait until the disk knows the names in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
