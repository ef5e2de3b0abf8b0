"""Check a feature folder: find what is wrong with it, and say how to repair it. No torch.

Every file is checked against another: the parts against the log, the log against the parts, the
ids of the inputs and the certificate against the manifest, the manifest against its own checksum.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from packvit.corpus import UsageError
from packvit.corpus.folder.layout import (
    Commit,
    decode_commit,
    encode_manifest,
    fingerprint,
    read_log,
    read_manifest,
)
from packvit.corpus.folder.names import CURRENT, MTIMES, Names, names_of, part_number
from packvit.corpus.folder.opening import MOST_MANIFEST, find_flaw, read_own
from packvit.corpus.folder.ownership import files_in, is_ours, left_over
from packvit.corpus.folder.parts import Outputs, encode_kept, read_part
from packvit.corpus.folder.resume import BESIDE, find_damage, find_fault
from packvit.corpus.folder.sharding import WHOLE, find_shard_flaw, parts_of, shard_of
from packvit.corpus.folder.stores import Folder
from packvit.corpus.folder.swapping import restore
from packvit.images.errors import CODES

AGAIN = "Run the same embed command again: it keeps the parts that are whole."
MANIFEST_MEND = (
    "Run the same embed command again; if it is refused, restore a copy of the file, or start "
    "over with --overwrite."
)
BUG = "The bytes match the log, so packvit wrote them so: start over with --overwrite."
UNTOLD = (*BESIDE, "format", "fingerprint", "inputs", "shard")  # by the fingerprint


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong: in which file, what, and how to repair it."""

    file: str
    found: str
    mend: str


@dataclass(slots=True)
class Check:
    """What a check has found so far."""

    folder: str
    parts: int = 0  # whole ones, and what they hold
    rows: int = 0
    tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # rows by code
    faults: list[Fault] = field(default_factory=list)

    def add(self, file: str, found: str, mend: str = AGAIN) -> None:
        """Add a fault."""
        self.faults.append(Fault(file, found, mend))


def check_folder(folder: Folder) -> Check:
    """Read all of a feature folder; return what it holds and everything that is wrong.

    Raises: UsageError if it is not a feature folder; OSError if a file can't be read.
    """
    restore(folder)
    names = names_of(folder)
    if not folder.is_dir() or not (is_ours(folder) or (folder / names.commits).exists()):
        holds = f"it holds no {CURRENT.manifest} of packvit and no {CURRENT.commits}"
        holds = holds if folder.exists() else "it does not exist"
        raise UsageError(
            f"{folder} is not a feature folder: {holds}. "
            "Name the folder that was given to embed as --out."
        )
    check = Check(str(folder))
    manifest = check_manifest(check, folder, names)
    entries = check_log(check, folder, names)
    ids, kept = hashlib.sha256(), hashlib.sha256()
    for number, entry in sorted(entries.items()):
        check_part(check, folder, number, entry, manifest, (ids, kept))
    if manifest:
        check_whole(check, names, manifest, entries, (ids.hexdigest(), kept.hexdigest()))
    stray = {name for name in files_in(folder, names.parts) if part_number(name) is not None}
    for name in sorted(stray - {entry.part for entry in entries.values()}):
        check.add(name, f"is not in {names.commits}, so readers must not use it.")
    for name in left_over(folder):
        check.add(name, "is a temporary file left by a killed job.")
    return check


def check_manifest(check: Check, folder: Folder, names: Names) -> dict[str, Any] | None:
    """Check the manifest, the certificate and the exports; return the manifest if it is whole."""
    manifest = read_manifest(folder)
    if manifest is None:
        state = describe_manifest(folder / names.manifest)
        check.add(names.manifest, state, MANIFEST_MEND)
        return None
    if read_own(folder / names.manifest, MOST_MANIFEST) != encode_manifest(manifest):
        check.add(
            names.manifest, "is damaged: its checksum does not match its entries.", MANIFEST_MEND
        )
        return None
    if flaw := find_flaw(manifest, names) or find_shard_flaw(manifest):
        check.add(names.manifest, flaw, MANIFEST_MEND)
        return None
    settings = {name: value for name, value in manifest.items() if name not in UNTOLD}
    if manifest.get("format") != names.format or manifest.get("fingerprint") != fingerprint(
        settings
    ):
        check.add(
            names.manifest,
            f'is not in format "{names.format}", or its fingerprint does not match its settings.',
            MANIFEST_MEND,
        )
        return None
    try:
        digest = sha256(read_own(folder / names.certificate, MOST_MANIFEST))
    except OSError:  # also a link or a pipe
        digest = None
    if digest != manifest.get("certificate_sha256"):
        state = "is missing" if digest is None else "is not the one recorded in the manifest"
        check.add(
            names.certificate, f"{state}.", "Run the same embed command again, with --verify."
        )
    if (record := manifest.get("mtimes")) and (fault := find_damage(folder / MTIMES, **record)):
        check.add(
            MTIMES, f"{fault}.", "Embed with --update --trust-mtime: all files are read once more."
        )
    exports = manifest.get("exports", {})
    for name, record in exports.items():
        if fault := find_damage(folder / name, **record):
            check.add(name, f"{fault}.", "Run the same embed command again, with --format npy.")
    for name in (names.pooled, names.ids):
        if name not in exports and (folder / name).exists():
            check.add(name, f"is not in {names.manifest}, so readers must not use it.")
    return manifest


def describe_manifest(path: Folder) -> str:
    """Return why a manifest cannot be read, as the end of a sentence."""
    if not path.exists() and not path.is_symlink():
        return "is missing."
    try:
        read_own(path, MOST_MANIFEST)
    except OSError as error:
        return f"cannot be read: {error.strerror}."
    return "is damaged: it is not JSON, or nested too deeply."


def check_log(check: Check, folder: Folder, names: Names) -> dict[int, Commit]:
    """Return the entries of the log by part number."""
    entries: dict[int, Commit] = {}
    for place, line in enumerate(read_log(folder)):
        entry = decode_commit(line)
        number = part_number(entry.part) if entry else None
        if entry is None or number is None:
            check.add(names.commits, f"line {place + 1} is damaged or cut short.")
        elif number in entries or number < max(entries, default=0):
            check.add(names.commits, f"line {place + 1} ({entry.part}) is out of order.")
        else:
            entries[number] = entry
    return entries


def check_part(
    check: Check,
    folder: Folder,
    number: int,
    entry: Commit,
    manifest: dict[str, Any] | None,
    digests: tuple[Any, Any],  # hash objects, updated with the ids and with what was kept
) -> None:
    """Check a part against its line in the log and against the manifest."""
    fault = find_fault(folder, entry)
    if fault:
        check.add(entry.part, f"{fault}.")
        return
    try:
        table = read_part(folder / entry.part)
        plain = table.select(["id", "status", "stage", "frames", "rows", "columns"]).to_pydict()
    except (OSError, pa.ArrowException, KeyError) as error:
        check.add(entry.part, f"cannot be read as a part ({type(error).__name__}).", BUG)
        return
    check.parts += 1
    check.rows += table.num_rows
    for name in plain["id"]:
        digests[0].update(name.encode() + b"\0")
    good = np.array([status == "ok" for status in plain["status"]], bool)
    tokens = np.array(
        [
            f * r * c if ok and f and r and c else 0
            for f, r, c, ok in zip(
                plain["frames"], plain["rows"], plain["columns"], good, strict=True
            )
        ],
        np.int64,
    )
    check.tokens += int(tokens.sum())
    for status in plain["status"]:
        if status != "ok":
            check.errors[status] = check.errors.get(status, 0) + 1
    counted = (table.num_rows, int((~good).sum()), int(tokens.sum()))
    if counted != (entry.rows, entry.errors, entry.tokens):
        check.add(
            names_of(folder).commits,
            f"says {entry.rows} rows, {entry.errors} errors and {entry.tokens} tokens of "
            f"{entry.part}, which holds {counted[0]}, {counted[1]} and {counted[2]}.",
            "Remove the line; then the same embed command embeds the part again.",
        )
    if len(set(plain["id"])) < table.num_rows:
        check.add(entry.part, "names an input twice.", BUG)
    if manifest:
        size = manifest["rows_per_part"]
        expected = min(size, manifest["inputs"] - number * size)
        if table.num_rows != expected:
            check.add(entry.part, f"holds {table.num_rows} rows, not {expected}.", BUG)
        if not table.schema.equals(Outputs.of_manifest(manifest).schema):
            check.add(entry.part, "does not have the columns that the manifest describes.", BUG)
            return
        for text in encode_kept(table, manifest):
            digests[1].update(text.encode() + b"\0")
    for found in features_faults(table, plain, good, tokens):
        check.add(entry.part, found, BUG)


def features_faults(
    table: pa.Table, plain: dict[str, list[Any]], good: np.ndarray, tokens: np.ndarray
) -> Iterator[str]:
    """Yield what is wrong with the rows and features of a part."""
    if not set(plain["status"]) <= {"ok", *CODES}:
        yield "holds a status that is neither ok nor an error code."
    if any((stage is None) != ok for stage, ok in zip(plain["stage"], good, strict=True)):
        yield "holds a row whose stage does not match its status."
    for name in table.column_names:
        column = table[name].combine_chunks()
        if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
            continue
        if not np.array_equal(column.is_valid().to_numpy(zero_copy_only=False), good):
            yield f"holds {name} where a row is an error, or none where it is ok."
        if pa.types.is_list(column.type):
            lengths = column.value_lengths().fill_null(0)
            if not np.array_equal(lengths.to_numpy(zero_copy_only=False), tokens):
                yield f"holds {name} of other lengths than frames x rows x columns."
        values = column.drop_null().flatten()
        while pa.types.is_fixed_size_list(values.type):
            values = values.flatten()
        if not np.isfinite(values.to_numpy(zero_copy_only=False)).all():
            yield f"holds {name} with NaN or infinity in a row that is ok."


def check_whole(
    check: Check,
    names: Names,
    manifest: dict[str, Any],
    entries: dict[int, Commit],
    digests: tuple[str, str],
) -> None:
    """Check that no part is missing, and that the rows are the job's inputs.

    `digests` are those of the ids, and of what was kept.
    """
    wanted, shard = parts_of(manifest), shard_of(manifest)
    parts = len(wanted)
    whose = "this job" if shard == WHOLE else f"shard {shard}"
    listed = sum(number in wanted for number in entries)
    if listed < parts:
        first = next(number for number in wanted if number not in entries)
        check.add(
            names.commits,
            f"lists {listed:,} of {parts:,} parts: {names.part(first)} is the first that is not "
            "there.",
        )
    if any(number not in wanted for number in entries):
        check.add(names.commits, f"lists parts beyond the {parts} of {whose}.")
    if not manifest["complete"]:
        check.add(names.manifest, "says that the job is not complete.")
    # Ids are unique in the listing, so an equal digest means that the rows' ids are unique too.
    whole = shard == WHOLE and check.parts == parts == len(entries)
    if whole and digests[0] != manifest["inputs_sha256"]:
        check.add(names.manifest, "lists other inputs than the rows, or in another order.", BUG)
    if whole and "keep" in manifest and digests[1] != manifest.get("kept_sha256"):
        check.add(names.manifest, "was written for other kept columns than the rows have.", BUG)
    counts = {
        "rows": check.rows,
        "ok": check.rows - sum(check.errors.values()),
        "errors": check.errors,
        "tokens": check.tokens,
        "parts": check.parts,
    }
    if manifest["complete"] and check.parts == parts and manifest["counts"] != counts:
        check.add(
            names.manifest,
            f"counts {json.dumps(manifest['counts'])}, the parts hold {counts}.",
            AGAIN,
        )


def sha256(data: bytes) -> str:
    """Return the digest of `data`."""
    return hashlib.sha256(data).hexdigest()
