"""The commits of a feature folder in an object store, an object for each part. No torch.

    _commits/00000.json   the line that the log of a local folder would have

Together, in their order, they are that log. While a part that is committed is replaced, its commit
has two lines: the new one and the old. It is put first, then the part, then the commit of one
line, so that at any request the part is the one or the other, and is told by its sha256.
"""

import hashlib
import re
from collections.abc import Sequence

import pyarrow as pa

from packvit.corpus.folder.commits import (
    Commit,
    Staged,
    decode_commit,
    describe_change,
    encode_commit,
)
from packvit.corpus.folder.names import COMMITS, DATA, part_number
from packvit.corpus.folder.stores import StorePath, read_many, remove_many

NAMED = re.compile(r"(\d{5,12})\.json")


def name_commit(number: int) -> str:
    """Return the path of the commit of part `number`."""
    return f"{COMMITS}{number:05d}.json"


def is_commit(path: str) -> bool:
    """Return whether a path below a folder is that of a commit."""
    found = NAMED.fullmatch(path.removeprefix(COMMITS))
    return bool(found and path == name_commit(int(found[1])))


def list_commits(folder: StorePath) -> list[StorePath]:
    """Return the paths of all commits, in the order of their parts."""
    found = [path for path in (folder / COMMITS).iterdir() if is_commit(COMMITS + path.name)]
    return sorted(found, key=lambda path: int(path.name[:-5]))


def read_lines(folder: StorePath) -> tuple[bytes, ...]:
    """Return a line for each commit, with its line break; of two the one that its part has."""
    return tuple(choose_line(folder, data) for data in read_many(list_commits(folder)))


def choose_line(folder: StorePath, data: bytes) -> bytes:
    """Return the line of a commit."""
    lines = data.splitlines(keepends=True)
    entries = [entry for line in lines if (entry := decode_commit(line))]
    if len(lines) != 2 or len(entries) != 2 or part_number(entries[0].part) is None:
        return data
    part = (folder / entries[0].part).find_bytes()
    is_old = part is not None and hashlib.sha256(part).hexdigest() == entries[1].sha256
    return lines[is_old]


def settle(folder: StorePath) -> None:
    """Put the commits of two lines again, each with the one that its part has."""
    paths = list_commits(folder)
    for path, data in zip(paths, read_many(paths), strict=True):
        if (line := choose_line(folder, data)) != data:
            path.write(line)


def stage_object(
    folder: StorePath, number: int, entry: Commit, data: pa.Buffer, *, replaces: bool
) -> Staged:
    """Put a part, which is not committed by that.

    Raises: StoreError.
    """
    if replaces:
        path = folder / name_commit(number)
        before = choose_line(folder, path.find_bytes() or b"")
        if decode_commit(before):
            path.write(encode_commit(entry).encode() + b"\n" + before)
    (folder / entry.part).write(data)
    return Staged(entry, "")


def enter_object(folder: StorePath, staged: Staged) -> Commit:
    """Put the commit of a part.

    Raises: StoreError.
    """
    number = part_number(staged.entry.part)
    assert number is not None
    (folder / name_commit(number)).write(encode_commit(staged.entry).encode() + b"\n")
    return staged.entry


def keep_commits(folder: StorePath, entries: Sequence[Commit]) -> None:
    """Remove all commits but those of `entries`."""
    kept = {name_commit(part_number(entry.part) or 0) for entry in entries}
    found = list_commits(folder)
    remove_many([path for path in found if COMMITS + path.name not in kept])


def find_change(sizes: dict[str, int], entry: Commit) -> str | None:
    """Return how an object's size differs from its commit, as the end of a sentence, or None."""
    size = sizes.get(entry.part.removeprefix(DATA))
    return "is missing" if size is None else describe_change(size, entry.bytes)
