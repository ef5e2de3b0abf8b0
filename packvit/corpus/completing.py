"""Complete a locked folder: embed the parts and rows that it does not hold, and commit them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from packvit.corpus import UsageError
from packvit.corpus.encode.filling import Shard
from packvit.corpus.folder.exports import Format, export
from packvit.corpus.folder.layout import Commit, encode_certificate, encode_manifest, put
from packvit.corpus.folder.names import names_of, part_number
from packvit.corpus.folder.parts import Outputs
from packvit.corpus.folder.pending import remove_inputs, write_inputs
from packvit.corpus.folder.resume import Resumed, read_rows
from packvit.corpus.folder.reuse import Reusing, has_mtimes, indexed, write_mtimes
from packvit.corpus.folder.sharding import parts_of, rows_of
from packvit.corpus.folder.stores import Folder
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.progress import Summary, Tally
from packvit.corpus.runners.order import Runner, Work
from packvit.images.errors import CODES


def run(
    runner: Runner,
    listing: Listing,
    folder: Folder,
    found: Resumed,
    again: Mapping[int, tuple[int, ...]],
    certificate: Mapping[str, Any] | None,
    format: Format,
    reusing: Reusing,
    tally: Tally,
) -> Summary:
    """Run all shards that the locked folder does not hold, and commit them in order.

    `again` are the rows to embed again, by the number of their part.
    """
    names = names_of(folder)
    manifest = found.manifest | {"complete": False, "counts": None}
    if certificate is not None:
        data = encode_certificate(certificate)
        put(folder / names.certificate, data)
        manifest |= {"certificate_sha256": hashlib.sha256(data).hexdigest()}
    parts = parts_of(manifest)
    todo = len(parts) - len(found.kept) + len(again)
    exports = manifest.get("exports") or {}
    if again:  # which they no longer match
        manifest |= {"exports": {}}
        format = "npy" if exports else format
        exports = {}
    if todo:
        manifest |= found.begun
        write_inputs(folder, listing)
        if reusing.trust_mtime and not has_mtimes(folder, manifest):
            size = manifest["rows_per_part"]
            manifest |= {"mtimes": write_mtimes(folder, listing, size, found.kept)}
        put(folder / names.manifest, encode_manifest(manifest))
    for number, entry in sorted(found.kept.items()):
        rows = read_rows(folder, entry)
        undone = again.get(number, ())
        tally.count([row for place, row in enumerate(rows) if place not in undone])
    kept_rows, kept_tokens = tally.progress.settled, tally.progress.tokens
    tally.begin(found.notes)
    halved, last = 0, max(found.kept, default=-1)
    size = manifest["rows_per_part"]
    inputs = shards(listing, parts, size, folder, found.kept, again)
    work = Work(inputs, todo, folder, last, tally.settle, tally.effort)
    if todo:
        with indexed(folder, reusing), closing(runner(work)) as entries:
            for entry in entries:
                halved += entry.halved
                undone = again.get(part_number(entry.part) or 0)
                rows = entry.rows if undone is None else len(undone)
                tally.update(committed=tally.progress.committed + rows)
    seconds = tally.seconds
    counts = {
        "rows": rows_of(manifest),
        "ok": tally.codes["ok"],
        "errors": tally.errors,
        "tokens": tally.progress.tokens,
        "parts": len(parts),
    }
    assert counts["rows"] == tally.progress.committed == tally.codes.total()
    if format == "npy":
        written = [names.part(number) for number in parts]
        outputs = Outputs.of_manifest(manifest)
        manifest |= {"exports": export(folder, names, written, counts["rows"], outputs, exports)}
    put(folder / names.manifest, encode_manifest(manifest | {"complete": True, "counts": counts}))
    remove_inputs(folder)
    return Summary(
        folder=str(folder),
        model=str(manifest["model"]),
        fingerprint=str(manifest["fingerprint"]),
        rows=counts["rows"],
        ok=tally.codes["ok"],
        errors=tally.errors,
        examples={code: tally.examples[code] for code in tally.errors},
        ignored=listing.ignored,
        tokens=tally.progress.tokens,
        seconds=seconds,
        kept_rows=kept_rows,
        kept_tokens=kept_tokens,
        shares=tally.progress.shares,
        halved=halved,
        passed_over=dict(listing.passed_over.most_common()),
        reused=tally.effort.reused,
        on_gpu=tally.effort.on_gpu if manifest["preprocessing"]["decode"] == "gpu" else None,
    )


def shards(
    listing: Listing,
    parts: range,
    size: int,
    folder: Folder,
    kept: Mapping[int, Commit],
    again: Mapping[int, tuple[int, ...]],
) -> Iterator[Shard]:
    """Yield the inputs of the parts in order; of a part that is kept, only the rows to do again.

    A part has `size` inputs, the last one what is left.
    """
    for number in parts:
        inputs = listing.between(number * size, (number + 1) * size)
        if number not in kept:
            yield Shard(number, tuple(inputs))
        elif places := again.get(number):
            wanted = set(places)
            chosen = (source for place, source in enumerate(inputs) if place in wanted)
            yield Shard(number, tuple(chosen), folder / kept[number].part, places)


def choose_codes(retry: bool | Sequence[str]) -> frozenset[str]:
    """Return the error codes whose rows are embedded again.

    Raises: UsageError for a code that rows do not have.
    """
    if isinstance(retry, bool):
        return frozenset(CODES) if retry else frozenset()
    named = (retry,) if isinstance(retry, str) else tuple(retry)
    if unknown := [code for code in named if code not in CODES]:
        raise UsageError(f'retry_errors names "{unknown[0]}". Choose of: {", ".join(CODES)}.')
    return frozenset(named)


def find_errors(
    folder: Folder, kept: Mapping[int, Commit], codes: frozenset[str]
) -> dict[int, tuple[int, ...]]:
    """Return the places of the rows with such codes, by the number of their part."""
    found = {}
    for number, entry in kept.items() if codes else ():
        rows = read_rows(folder, entry) if entry.errors else ()
        if places := tuple(place for place, row in enumerate(rows) if row.status in codes):
            found[number] = places
    return found
