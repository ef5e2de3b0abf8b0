"""How the files of a feature folder are written atomically and read. No torch.

A part is written under a temporary name, flushed, renamed, and only then added to the log, so
readers use the log and not the listing of the folder. Lines are in the order of the parts. Nothing
that is written depends on the clock: the same rows give the same bytes.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from packvit.atomic import (
    rename_flushed,
    replacing,
    sync,
    temporary_name,
    write_flushed,
    write_whole,
)
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.commits import (
    Commit,
    Staged,
    decode_commit,
    describe_part,
    encode_commit,
)
from packvit.corpus.folder.leases import leased
from packvit.corpus.folder.names import LOCK, names_of, part_name, part_number
from packvit.corpus.folder.objects import enter_object, keep_commits, read_lines, stage_object
from packvit.corpus.folder.opening import MOST_LOG, MOST_MANIFEST, decode_object, read_own
from packvit.corpus.folder.parts import encode_parquet
from packvit.corpus.folder.stores import Folder, StorePath, uploading

CHECKSUM = "manifest_sha256"


def commit(
    folder: Folder, number: int, table: pa.Table, *, mends: bool = False, halved: int = 0
) -> Commit:
    """Write part `number` and add it to the log; on failure leave neither.

    `mends` says that the log has later parts already: then it is rewritten in one step, since its
    lines are in the order of the parts.

    Raises: WriteError if it cannot be written.
    """
    staged = stage(folder, number, table, halved=halved, replaces=mends)
    return enter(folder, staged, mends=mends)


def stage(
    folder: Folder,
    number: int,
    table: pa.Table,
    *,
    attempt: str = "",
    halved: int = 0,
    replaces: bool = False,
) -> Staged:
    """Write part `number` under a temporary name, flushed; on failure leave nothing.

    `attempt` makes the name unique if another process may still be writing the same part. An object
    store has no temporary names; there `replaces` says whether the part may replace another.

    Raises: WriteError if it cannot be written.
    """
    path = names_of(folder).part(number)
    data = encode_parquet(table)
    entry = describe_part(path, table, data, halved)
    if isinstance(folder, StorePath):
        return stage_object(folder, number, entry, data, replaces=replaces)
    temporary = folder / temporary_name(part_name(number), attempt)
    with writing(folder / path):
        write_flushed(temporary, data)
    return Staged(entry, temporary.name)


def enter(folder: Folder, staged: Staged, *, mends: bool = False) -> Commit:
    """Rename a staged part and add it to the log; on failure leave neither.

    Raises: WriteError if it cannot be written.
    """
    if isinstance(folder, StorePath):
        return enter_object(folder, staged)
    part = folder / staged.entry.part
    before = read_commits(folder) if mends else ()
    if any(entry.part == staged.entry.part for entry in before):
        return replace_part(folder, staged, before)
    try:
        with writing(part):
            make_folder(part.parent)
            rename_flushed(folder / staged.file, part)
        if mends:
            write_commits(folder, [*before, staged.entry])
        else:
            append_line(folder / names_of(folder).commits, encode_commit(staged.entry))
    except WriteError:
        for path in (folder / staged.file, part):
            with suppress(OSError):  # for example a folder of that name
                path.unlink()
        raise
    return staged.entry


def replace_part(folder: Path, staged: Staged, before: Sequence[Commit]) -> Commit:
    """Put a staged part in the place of one that the log lists; on failure leave the old one.

    The log comes first: if the part that it names is only staged, `finish_replacements` renames it.

    Raises: WriteError if it cannot be written.
    """
    part, temporary = folder / staged.entry.part, folder / staged.file
    others = [entry for entry in before if entry.part != staged.entry.part]
    try:
        write_commits(folder, [*others, staged.entry])
    except WriteError:
        with suppress(OSError):
            temporary.unlink()
        raise
    with writing(part):
        rename_flushed(temporary, part)
    return staged.entry


def read_log(folder: Folder) -> tuple[bytes, ...]:
    """Return the lines of the log with their line breaks; the last may lack one.

    Raises: WriteError if the log exists and cannot be read, since it says what a job may keep.
    """
    if isinstance(folder, StorePath):
        return read_lines(folder)
    path = folder / names_of(folder).commits
    try:
        with reading(path):
            data = read_own(path, MOST_LOG)
    except FileNotFoundError:
        return ()
    *lines, rest = data.split(b"\n")
    return (*(line + b"\n" for line in lines), *([rest] if rest else []))


def read_commits(folder: Folder) -> tuple[Commit, ...]:
    """Return the entries of the log of `folder`; damaged lines are skipped."""
    found = (decode_commit(line) for line in read_log(folder))
    return tuple(entry for entry in found if entry)


def write_commits(folder: Folder, entries: Sequence[Commit]) -> None:
    """Replace the log by `entries`, in the order of their parts."""
    if isinstance(folder, StorePath):
        return keep_commits(folder, entries)
    ordered = sorted(entries, key=lambda entry: part_number(entry.part) or 0)
    text = "".join(encode_commit(entry) + "\n" for entry in ordered)
    return write_own(folder / names_of(folder).commits, text.encode())


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest's bytes; its last entry is a checksum of all others."""
    checksum = fingerprint(manifest)
    return (json.dumps({**manifest, CHECKSUM: checksum}, indent=2) + "\n").encode()


def write_manifest(folder: Folder, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest in one step."""
    write_own(folder / names_of(folder).manifest, encode_manifest(manifest))


def put(path: Folder, data: bytes) -> None:
    """Write a file unless it already holds these bytes, so that a finished job changes nothing."""
    with reading(path):
        same = path.is_file() and path.read_bytes() == data
    if not same:
        write_own(path, data)


def write_own(path: Folder, data: bytes) -> None:
    """Write a file atomically, in place of any of that name."""
    if isinstance(path, StorePath):
        return path.write(data)
    with writing(path):
        return write_whole(path, data)


@contextmanager
def building(path: Folder, *, beside: Folder | None = None) -> Iterator[Path]:
    """Yield a temporary path, whose file then replaces `path` atomically.

    On a disk it is in the folder `beside`, or else in that of `path`, which is made if needed.
    """
    if isinstance(path, StorePath):
        with uploading(path) as local:
            yield local
    else:
        assert not isinstance(beside, StorePath)
        with writing(path), replacing(path, beside=beside) as (temporary,):
            yield temporary
            make_folder(path.parent)


def encode_certificate(certificate: Mapping[str, Any]) -> bytes:
    """Return the bytes of a certificate's file."""
    return (json.dumps(certificate, indent=1) + "\n").encode()


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """Return the manifest of `folder` without its checksum, or None if none can be read."""
    try:
        return decode_manifest(read_own(folder / names_of(folder).manifest, MOST_MANIFEST))
    except OSError:
        return None


def decode_manifest(data: bytes) -> dict[str, Any] | None:
    """Return the manifest of these bytes without its checksum, or None if they are not one."""
    manifest = decode_object(data)
    if manifest is None:
        return None
    return {name: value for name, value in manifest.items() if name != CHECKSUM}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the digest of all settings that decide which numbers a job writes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def claim(folder: Folder) -> Iterator[Folder]:
    """Create `folder` if needed, lock it against other jobs, and yield where to write.

    On a disk the system releases the lock however the process ends. The lock file stays: if it were
    removed, one job could lock the old file while another locks the new one. An update puts another
    folder, with another file, in this one's place: the lock of what was there before is no lock.

    Raises: UsageError if another job holds it; WriteError if it cannot be made.
    """
    if isinstance(folder, StorePath):
        with leased(folder) as claimed:
            yield claimed
        return
    with writing(folder):
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # of one that may be written to and not read
                sync(folder.parent)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            with writing(folder / LOCK):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                    raise BlockingIOError(errno.EAGAIN, "the folder was replaced just now")
        except WriteError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise UsageError(
                f"Another job is writing to {folder}. Wait for it, or choose another folder."
            ) from error
        yield folder
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Folder) -> Iterator[None]:
    """Turn an OSError into a WriteError with a message for the user."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} could not be written: {error.strerror}. Fix that, then start the job again: "
            "it resumes after the parts that are committed."
        ) from error


@contextmanager
def reading(path: Folder) -> Iterator[None]:
    """Turn an OSError into a WriteError, except FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, WriteError):
        raise
    except OSError as error:
        raise WriteError(
            f"{path} could not be read: {error.strerror or error}. Fix that, then start the job "
            "again."
        ) from error


def append_line(path: Path, line: str) -> None:
    """Append a line to `path` and flush it; on failure remove what was appended."""
    data = line.encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) < len(data):  # a disk that fills up writes only a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
            sync(path.parent)
        except OSError:
            file.truncate(before)
            raise


def make_folder(path: Path) -> None:
    """Create a folder if needed, and flush its name to disk.

    Raises: OSError.
    """
    if not path.is_dir():
        path.mkdir()
        sync(path.parent)
