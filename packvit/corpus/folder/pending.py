"""The inputs of an unfinished job, kept in its folder until it is done. No torch.

The manifest has only a digest of their ids. With the ids, an input that is deleted before the job
resumes becomes a row `missing`, and the job goes on.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from packvit.corpus.folder.layout import building, read_commits, writing
from packvit.corpus.folder.names import PENDING, part_number
from packvit.corpus.folder.opening import open_own
from packvit.corpus.folder.parts import find_keep_flaw, read_part
from packvit.corpus.folder.stores import Folder
from packvit.corpus.inputs.addresses import is_url
from packvit.corpus.inputs.listing import Gone, Listing

MOST_LINE = 64 << 20  # bytes of an id, a path and what is kept; a longer line is no JSON
MOST_NAMED = 3  # of the inputs in a message


def write_inputs(folder: Folder, listing: Listing) -> None:
    """Write the ids of all inputs, the paths of local ones, and what is kept of each.

    If the file is there, it stays.

    URLs are left out: they may have credentials.
    """
    path = folder / PENDING
    if path.is_file() and not path.is_symlink() and is_whole(path, listing.sha256()):
        return
    with (
        building(path) as temporary,
        temporary.open("wb") as file,
        # No name and no time in its header: the same inputs give the same bytes.
        gzip.GzipFile("", "wb", 1, file, 0) as packed,
    ):
        for source in listing:
            line = [source.id] if is_url(source.path) else [source.id, source.path]
            if source.kept is not None:
                line = [source.id, *(line[1:] or [None]), json.loads(source.kept)]
            packed.write(json.dumps(line).encode() + b"\n")


def remove_inputs(folder: Folder) -> None:
    """Remove the file of a job that is done."""
    with writing(folder / PENDING):
        (folder / PENDING).unlink(missing_ok=True)


def read_inputs(path: Folder) -> Iterator[tuple[str, str | None, list[Any]]]:
    """Yield the ids, local paths and kept values that `write_inputs` wrote.

    Raises: OSError, EOFError, zlib.error or ValueError if the file is damaged.
    """
    with open_own(path) as packed, gzip.open(packed) as file:
        while line := file.readline(MOST_LINE):
            name, *rest = json.loads(line)
            yield name, rest[0] if rest else None, rest[1] if len(rest) > 1 else []


def is_whole(path: Folder, digest: str) -> bool:
    """Return whether the file's ids have the digest of a manifest."""
    ids = hashlib.sha256()
    try:
        for name, *_ in read_inputs(path):
            ids.update(name.encode() + b"\0")
    except (OSError, EOFError, zlib.error):
        return False
    except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or not ours
        return False
    return ids.hexdigest() == digest


def read_missing(
    folder: Folder, keep: Sequence[str]
) -> Iterator[tuple[str, str | None, list[Any]]]:
    """Yield the ids and kept values of a job whose parts are all there.

    The path is "" unless the input was missing.

    Raises: OSError or pyarrow.ArrowException if a part cannot be read.
    """
    for entry in sorted(read_commits(folder), key=lambda entry: part_number(entry.part) or 0):
        table = read_part(folder / entry.part, ["id", "status", *keep])
        for row in table.to_pylist():
            gone = row["status"] == "missing"
            yield row["id"], None if gone else "", [row[name] for name in keep]


def take_over(folder: Folder, recorded: Mapping[str, Any], listing: Listing) -> tuple[str, ...]:
    """Give a listing the inputs of a recorded job that have disappeared, and return a note on it.

    If that does not make it the recorded job's, the listing stays as it is.
    """
    digest = recorded.get("inputs_sha256")
    path, known_by_parts = folder / PENDING, False
    keep = [name for name, _ in recorded.get("keep", ())] if not find_keep_flaw(recorded) else []
    if not isinstance(digest, str) or digest == listing.sha256():
        return ()
    if path.is_file() and not path.is_symlink() and is_whole(path, digest):
        known = read_inputs(path)
    elif recorded.get("complete") is True:
        known, known_by_parts = read_missing(folder, keep), True
    else:
        return ()
    try:
        gone = listing.compare(
            (name, at, json.dumps(dict(zip(keep, kept, strict=True)))) for name, at, kept in known
        )
    except (OSError, ValueError, pa.ArrowException):
        return ()
    if known_by_parts:
        gone = listing.gone = replace(gone, knows_paths=False)
    if gone.new or gone.there or not listing.take_over(digest):
        return ()
    plural = "s of this job are" if gone.count > 1 else " of this job is"
    return (f"{gone.count:,} input{plural} no longer there: {named(gone.names, gone.count)}.",)


def describe(gone: Gone | None) -> str | None:
    """Return how a job's inputs differ from the recorded ones, or None if that is not known."""
    if gone is None:
        return None
    left = "left out though there" if gone.knows_paths else "left out, or no longer there"
    said = [
        (gone.names, gone.count, "no longer there"),
        (gone.there, gone.count_there, left),
        (gone.new, gone.count_new, "new"),
    ]
    return "; ".join(f"{what}: {named(names, count)}" for names, count, what in said if count)


def named(names: tuple[str, ...], count: int) -> str:
    """Return the first few names, for a message."""
    shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in names[:MOST_NAMED])
    more = count - min(count, MOST_NAMED)
    return shown + (f" and {more:,} more" if more else "")
