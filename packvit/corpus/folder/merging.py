"""Put the shards of a job together: the folder that one job would have written. No torch.

Parts are copied as they are, so the bytes are those of one job. A merge that is stopped resumes
after the parts that it has committed.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packvit.atomic import sync, temporary_name
from packvit.corpus import UsageError
from packvit.corpus.folder.exports import Format, check_format, export
from packvit.corpus.folder.layout import (
    Commit,
    Staged,
    claim,
    encode_manifest,
    enter,
    put,
    read_commits,
    reading,
    writing,
)
from packvit.corpus.folder.names import CURRENT, part_name, part_number
from packvit.corpus.folder.opening import MOST_MANIFEST, open_own, read_own
from packvit.corpus.folder.ownership import check_usable
from packvit.corpus.folder.parts import Outputs
from packvit.corpus.folder.pending import remove_inputs
from packvit.corpus.folder.reader import open_finished
from packvit.corpus.folder.resume import BESIDE, Resumed, differences, take_up
from packvit.corpus.folder.reuse import join_reuse
from packvit.corpus.folder.sharding import WHOLE, JobShard, parts_of, shard_of
from packvit.corpus.folder.stores import Folder, find_folder
from packvit.corpus.inputs.addresses import check_local

BLOCK = 1 << 20  # bytes that are copied at once
MOST_NAMED = 5  # of shards or differences in a message
# What the manifests of two shards may differ in.
DIFFER = {*BESIDE, "shard"} - {"device_names"}


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """The folder of a finished shard."""

    folder: Folder
    manifest: Mapping[str, Any]
    shard: JobShard
    parts: Mapping[int, Commit]  # by number


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote, and how many of its parts were there before."""

    folder: str
    shards: int
    parts: int
    rows: int
    ok: int
    errors: dict[str, int]  # by code
    kept_parts: int


# Called with the rows that are written so far, and those of the job.
Told = Callable[[int, int], None]


def merge(
    folders: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    format: Format = "parquet",
    overwrite: bool = False,
    progress: Told | None = None,
) -> Merged:
    """Put the folders of all shards of a job together in the feature folder `out`.

    The sha256 of every part is verified. `format` and `overwrite` are as in `embed`.

    The folders may be in object stores, `out` is a local one.

    Raises: UsageError if the folders are not all shards of one job, each once and finished, or if
    a part is damaged; WriteError.
    """
    check_format(format)
    check_local(out)
    target = Path(out)
    named = [find_folder(folder, name="FOLDER") for folder in folders]
    local = [path for path in named if isinstance(path, Path) and path.exists()]
    if target.exists() and any(path.samefile(target) for path in local):
        raise UsageError(f"{target} is a shard itself. Choose another folder to merge into.")
    shards = check_alike([open_shard(path) for path in named])
    check_usable(target, overwrite=overwrite)
    manifest = draft(shards)
    with claim(target):
        found = take_up(target, manifest, overwrite=overwrite)
        return run(target, shards, found, manifest["certificate_sha256"], format, progress)


def open_shard(folder: Folder) -> ShardFolder:
    """Return the folder of a finished shard, its parts not read yet.

    Raises: UsageError if it is not finished, or does not list its parts.
    """
    manifest = open_finished(folder)
    parts = {part_number(entry.part): entry for entry in read_commits(folder)}
    wanted, size = parts_of(manifest), manifest["rows_per_part"]
    for number in wanted:
        entry, rows = parts.get(number), min(size, manifest["inputs"] - number * size)
        if entry is None or (entry.part, entry.rows) != (CURRENT.part(number), rows):
            raise UsageError(
                f"{folder / CURRENT.commits} does not list {CURRENT.part(number)} with its {rows} "
                f"rows. `packvit check {folder}` says how to repair it."
            )
    return ShardFolder(folder, manifest, shard_of(manifest), {n: parts[n] for n in wanted})


def check_alike(shards: Sequence[ShardFolder]) -> list[ShardFolder]:
    """Return the shards in order.

    Raises: UsageError unless they are all shards of one job, each once.
    """
    if not shards:
        raise UsageError("No folder is given. Name the folders of all shards.")
    first = next((each for each in shards if each.parts), shards[0])
    settings, numbers = told(first), dict[int, Folder]()
    for each in shards:
        if each.shard == WHOLE and len(shards) > 1:
            raise UsageError(f"{each.folder} holds a whole job, and no shard of one.")
        if each.shard.count != first.shard.count:
            raise UsageError(
                f"{each.folder} is shard {each.shard} and {first.folder} is shard {first.shard}: "
                "they are of jobs cut differently."
            )
        found = told(each)
        if not each.parts:  # nor any device
            found |= {"device_names": settings.get("device_names")}
        if lines := differences(settings, found):
            more = f", and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
            raise UsageError(
                f"{each.folder} is a shard of another job than {first.folder}: "
                f"{', '.join(lines[:MOST_NAMED])}{more}."
            )
        if each.shard.number in numbers:
            before = numbers[each.shard.number]
            raise UsageError(f"{before} and {each.folder} are both shard {each.shard}.")
        numbers[each.shard.number] = each.folder
    count = first.shard.count
    if missing := [str(JobShard(n, count)) for n in range(1, count + 1) if n not in numbers]:
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise UsageError(
            f"Of {count} shards {len(missing)} are not given: "
            f"{', '.join(missing[:MOST_NAMED])}{more}."
        )
    return sorted(shards, key=lambda each: each.shard.number)


def told(shard: ShardFolder) -> dict[str, Any]:
    """Return the entries of a manifest in which all shards of a job are equal."""
    return {name: value for name, value in shard.manifest.items() if name not in DIFFER}


def draft(shards: Sequence[ShardFolder]) -> dict[str, Any]:
    """Return the manifest of the whole job.

    What may differ is that of the first shard with parts, such as the root: where its photographs
    were on its machine. `packvit search --root` names another. It has a certificate if all of them
    have one.
    """
    certificates = [each.manifest["certificate_sha256"] for each in shards]
    first = next((each for each in shards if each.parts), shards[0])
    manifest = {name: value for name, value in first.manifest.items() if name != "shard"}
    manifest |= join_reuse([each.manifest.get("reused") for each in shards])
    return manifest | {
        "complete": False,
        "certificate_sha256": certificates[0] if all(certificates) else None,
        "exports": {},
        "counts": None,
    }


def run(
    folder: Path,
    shards: Sequence[ShardFolder],
    found: Resumed,
    certificate: str | None,
    format: Format,
    progress: Told | None,
) -> Merged:
    """Copy all parts that the locked folder does not hold, and commit them in order."""
    manifest = found.manifest | {"complete": False, "counts": None}
    manifest |= {"certificate_sha256": certificate}
    counts = add_counts(shards)
    parts = [(number, entry, each) for each in shards for number, entry in each.parts.items()]
    done = sum(entry.rows for entry in found.kept.values())

    def report(done: int) -> None:
        if progress:
            progress(done, counts["rows"])

    report(done)
    if certificate is not None:
        put(folder / CURRENT.certificate, read_certificate(shards[0].folder, certificate))
    if len(found.kept) < len(parts):
        put(folder / CURRENT.manifest, encode_manifest(manifest))
    last = max(found.kept, default=-1)
    for number, entry, each in parts:
        if number not in found.kept:
            enter(folder, copy_part(each.folder, entry, folder), mends=number <= last)
            done += entry.rows
            report(done)
    if format == "npy":
        names = [CURRENT.part(number) for number, _, _ in parts]
        outputs, before = Outputs.of_manifest(manifest), manifest["exports"]
        made = export(folder, CURRENT, names, counts["rows"], outputs, before)
        manifest |= {"exports": made}
    whole = manifest | {"complete": True, "counts": counts}
    put(folder / CURRENT.manifest, encode_manifest(whole))
    remove_inputs(folder)
    return Merged(
        folder=str(folder),
        shards=len(shards),
        parts=len(parts),
        rows=counts["rows"],
        ok=counts["ok"],
        errors=counts["errors"],
        kept_parts=len(found.kept),
    )


def add_counts(shards: Sequence[ShardFolder]) -> dict[str, Any]:
    """Return the counts of the whole job."""
    counts = [each.manifest["counts"] for each in shards]
    errors: Counter[str] = Counter()
    for each in counts:
        errors.update(each["errors"])
    return {
        "rows": sum(each["rows"] for each in counts),
        "ok": sum(each["ok"] for each in counts),
        "errors": dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))),
        "tokens": sum(each["tokens"] for each in counts),
        "parts": sum(each["parts"] for each in counts),
    }


def read_certificate(source: Folder, sha256: str) -> bytes:
    """Return the bytes of a shard's certificate.

    Raises: UsageError if it is not the one that the manifest records; WriteError.
    """
    path, data = source / CURRENT.certificate, None
    with suppress(FileNotFoundError), reading(path):
        data = read_own(path, MOST_MANIFEST)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        state = "missing" if data is None else "not the one that the manifest records"
        raise UsageError(
            f"{path} is {state}. Run the embed command of {source} again, with --verify; then "
            "merge again."
        )
    return data


def copy_part(source: Folder, entry: Commit, folder: Path) -> Staged:
    """Copy a part under a temporary name, flushed; on failure leave nothing.

    Raises: UsageError if it is not the part that was committed; WriteError.
    """
    path, digest = source / entry.part, hashlib.sha256()
    temporary = folder / temporary_name(part_name(part_number(entry.part) or 0))
    try:
        with reading(path), open_own(path) as file, writing(temporary), temporary.open("wb") as to:
            while block := file.read(BLOCK):
                digest.update(block)
                to.write(block)
        with writing(temporary):
            sync(temporary)
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing. {mend(source)}") from error
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if digest.hexdigest() != entry.sha256:
        temporary.unlink()
        raise UsageError(f"{path} is damaged: its sha256 is not what was committed. {mend(source)}")
    return Staged(entry, temporary.name)


def mend(source: Folder) -> str:
    """Return how to repair a shard."""
    return (
        f"Run the embed command of {source} again, which embeds that part anew; then merge again."
    )
