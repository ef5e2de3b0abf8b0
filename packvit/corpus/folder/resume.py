"""Resume a job: find what its folder already holds. No torch.

A job resumes in a folder whose manifest describes it: parts that the log lists and whose bytes
match are kept, all others are embedded again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from packvit.atomic import rename_flushed, sync
from packvit.corpus import UsageError
from packvit.corpus.folder.commits import describe_change
from packvit.corpus.folder.layout import (
    Commit,
    decode_commit,
    encode_manifest,
    read_commits,
    read_log,
    read_manifest,
    reading,
    write_commits,
    writing,
)
from packvit.corpus.folder.names import DATA, EXPORTS, TEMPORARY, names_of, part_number
from packvit.corpus.folder.objects import find_change, settle
from packvit.corpus.folder.opening import (
    MOST_MANIFEST,
    find_export_flaw,
    find_reuse_flaw,
    open_own,
    read_own,
)
from packvit.corpus.folder.ownership import check_usable, is_manifest, left_over, own_files
from packvit.corpus.folder.parts import read_part
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import Folder, StorePath, remove_many

# Entries of a manifest that may differ without making it another job.
BESIDE = (
    *("complete", "counts", "ignored", "root", "model"),
    *("certificate_sha256", "exports", "retries", "device_names", "reused", "mtimes"),
)


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a folder holds of the job: its manifest, the parts to keep by number, and notes.

    `begun` are entries that the manifest gets if any part is embedded.
    """

    manifest: dict[str, Any]
    kept: dict[int, Commit]
    notes: tuple[str, ...] = ()
    begun: Mapping[str, Any] = field(default_factory=dict)


def take_up(
    folder: Folder, manifest: Mapping[str, Any], *, overwrite: bool, inputs: str | None = None
) -> Resumed:
    """Return what `folder`, which this process has locked, holds of the job of `manifest`.

    Temporary files of a killed job are removed, and the log is reduced to the kept parts.
    `overwrite` removes everything that packvit wrote. `inputs` says how they differ, if they do.

    Raises: UsageError with the differences if the folder holds another job, or if it holds
    anything else; WriteError.
    """
    check_usable(folder, overwrite=overwrite)
    if not overwrite:
        finish_replacements(folder)
    with writing(folder):
        remove(folder, own_files(folder) if overwrite else left_over(folder), folders=overwrite)
    wanted: dict[str, Any] = json.loads(json.dumps(manifest))  # with lists for tuples, as if read
    recorded = read_manifest(folder)
    if recorded is None:
        return Resumed(wanted, {})
    differences = compare(recorded, wanted)
    if differences:
        differences += [f"inputs {inputs}"] if inputs else []
        lines = "\n".join(f"  {difference}" for difference in differences)
        raise UsageError(
            f"{folder} holds the features of another job. What differs, its -> yours:\n{lines}\n"
            "Give the same options to resume it, start over with `overwrite`, or choose another "
            "folder."
        )
    path = folder / names_of(folder).manifest
    with writing(path):
        whole = read_own(path, MOST_MANIFEST) == encode_manifest(recorded)
    if "root" in recorded:  # the photographs, told apart by their ids alone, may have been moved
        recorded = {**recorded, "root": wanted.get("root")}
    if find_reuse_flaw(recorded):
        said = ("reused", "mtimes", "device_names")
        recorded = {name: value for name, value in recorded.items() if name not in said}
        whole = False
    if find_export_flaw(recorded.get("exports", {}), names_of(folder)):
        recorded, whole = {**recorded, "exports": {}}, False
    kept, notes = keep(folder, wanted["inputs"], wanted["rows_per_part"])
    if not whole:  # it describes this job, but other entries are damaged
        made = {name: recorded.get(name) for name in ("certificate_sha256", "exports")}
        made |= {"reused": recorded["reused"]} if "reused" in recorded else {}
        recorded = {**wanted, **made}
    return Resumed(recorded, kept, tuple(notes))


def remove(folder: Folder, names: Sequence[str], *, folders: bool) -> None:
    """Remove files, and our `folders`, which must be empty then; manifests are the last."""
    if isinstance(folder, StorePath):
        remove_many([folder / name for name in names if not is_manifest(name)])
        return remove_many([folder / name for name in names if is_manifest(name)])
    for name in names:
        (folder / name).unlink()
    for name in (DATA, EXPORTS) if folders else ():
        if (folder / name).is_dir():
            (folder / name).rmdir()
    return sync(folder)


def finish_replacements(folder: Folder) -> None:
    """Rename the parts that a killed job had entered in the log in the place of others."""
    if isinstance(folder, StorePath):
        return settle(folder)
    logged = {os.path.basename(entry.part): entry for entry in read_commits(folder)}
    for name in left_over(folder):
        parsed = TEMPORARY.fullmatch(name)
        entry = logged.get(parsed[1]) if parsed else None
        if entry is None or find_damage(folder / name, entry.bytes, entry.sha256):
            continue
        with writing(folder / entry.part):
            if find_fault(folder, entry):
                rename_flushed(folder / name, folder / entry.part)
    return None


def compare(recorded: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each field in which two manifests describe different jobs."""
    differ = differing(recorded, manifest)
    if all(name.split(".")[0] in BESIDE for name in differ):
        return []
    named = [name for name in differ if name.split(".")[0] not in (*BESIDE, "fingerprint")]
    if "model" in differ:
        named.insert(0, "model")
    return [differ[name] for name in named or differ]


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return a line for each field in which two settings differ."""
    return list(differing(recorded, found).values())


def differing(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields in which two settings differ, and a line on each."""
    old, new = dict(flatten(recorded)), dict(flatten(found))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return {name: f"{name}: {show(old, name)} -> {show(new, name)}" for name in names}


def flatten(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield above + name, value


def show(values: Mapping[str, Any], name: str) -> str:
    """Return a value as JSON, a digest shortened; "nothing" if there is no value."""
    if name not in values:
        return "nothing"
    text = json.dumps(values[name])
    return f"{text[1:13]}..." if name.endswith("sha256") and len(text) == 66 else text


def keep(folder: Folder, inputs: int, rows_per_part: int) -> tuple[dict[int, Commit], list[str]]:
    """Return the parts of the log that are whole on disk, and notes on the others.

    The log is rewritten to list exactly these parts, in order. A last line that was cut short gets
    no note, since any killed job may leave one. Of a part in a store, which is there whole or not
    at all, only the size is compared.
    """
    kept: dict[int, Commit] = {}
    differs = partial(find_fault, folder)
    if isinstance(folder, StorePath):
        differs = partial(find_change, (folder / DATA).sizes())
    notes = []
    lines = read_log(folder)
    for line in lines:
        entry = decode_commit(line)
        number = part_number(entry.part) if entry else None
        rows = 0 if number is None else min(rows_per_part, inputs - number * rows_per_part)
        if entry is None or number is None or number in kept or entry.rows != rows:
            if line.endswith(b"\n"):
                notes.append(
                    f"A line of {names_of(folder).commits} is damaged; its part is embedded again."
                )
            continue
        with writing(folder / entry.part):
            fault = differs(entry)
        if fault:
            notes.append(f"{entry.part} {fault}; it is embedded again.")
        else:
            kept[number] = entry
    if [decode_commit(line) for line in lines] != [kept[number] for number in sorted(kept)]:
        write_commits(folder, list(kept.values()))
    return kept, notes


def find_fault(folder: Folder, entry: Commit) -> str | None:
    """Return how a part differs from its line in the log, as the end of a sentence, or None.

    Raises: OSError if it exists and cannot be read.
    """
    return find_damage(folder / entry.part, entry.bytes, entry.sha256)


def find_damage(path: Folder, bytes: int, sha256: str) -> str | None:
    """Return how a file differs from its recorded size and digest, as `find_fault` does."""
    try:
        file = open_own(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL):
            raise
        return f"is not the file that was committed: {error.strerror}"
    with file:
        if change := describe_change(file.seek(0, os.SEEK_END), bytes):
            return change
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == sha256 else "is damaged: its sha256 is not what was committed"


def read_rows(folder: Folder, entry: Commit) -> list[Row]:
    """Return the columns of a part's rows that a summary counts."""
    columns = ["id", "status", "rows", "columns"]
    with reading(folder / entry.part):
        table = read_part(folder / entry.part, columns)
    return [Row(**values) for values in table.to_pylist()]
