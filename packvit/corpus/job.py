"""`packvit.embed`: photographs in, a feature folder out.

The job lists its inputs, loads the encoder, claims the folder, and runs one shard after another,
but for those that the folder already holds. Every input ends as one row, and what was committed
stays whole however the job ends.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from packvit.corpus import WrongUse
from packvit.corpus.exports import Format, check_format, export
from packvit.corpus.folder import (
    CERTIFICATE,
    FORMAT,
    MANIFEST,
    claim,
    encode_certificate,
    encode_manifest,
    fingerprint,
    part_name,
    write_whole,
)
from packvit.corpus.inputs import Input, Listing, list_inputs
from packvit.corpus.parts import DtypeOut
from packvit.corpus.progress import Summary, Tally, Tell
from packvit.corpus.resume import Found, check_usable, read_rows, take_up
from packvit.corpus.runners import choose_runner
from packvit.corpus.runners.order import Runner, Work
from packvit.corpus.runners.worker import Job
from packvit.corpus.settings import (
    Options,
    check_options,
    describe,
    digest_weights,
    fit_options,
    load_encoder,
)
from packvit.corpus.shard import Shard
from packvit.encoder import Encoder, GridPolicy
from packvit.images import MAX_PIXELS
from packvit.sizes import Resize
from packvit.verification.job import vouch

TRIAL_MODEL = "tiny"
TRIAL_INPUTS = 1000  # the most that a job without a chosen model takes


def embed(
    photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | Encoder | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "auto",
    revision: str | None = None,
    positions: GridPolicy = "checkpoint",
    resize: Resize | None = None,
    max_patches: int | None = None,
    tokens: bool = False,
    taps: Sequence[int] = (),
    dtype_out: DtypeOut = "float16",
    format: Format = "parquet",
    token_budget: int = 16384,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    processes: int | None = None,
    ray: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: Tell | None = None,
) -> Summary:
    """Embed photographs into the feature folder `out`: one row for every input.

    Where `out` holds a part of this very job, the job goes on after it; where it holds all of it,
    no image is read. `overwrite` removes what packvit wrote there and starts over.

    `photos` are folders, which are walked, and files. `model` is a checkpoint's name or folder, or
    a loaded encoder, for which `device` to `positions` are already chosen; None tries the job out
    with the small untrained encoder that packvit brings. `tokens` and `taps` (layers, negative
    ones from the end) write every patch's features too, as `dtype_out`. `format` "npy" makes
    a NumPy matrix of the pooled features too, once all parts are there. `threads` decode in each
    process; None is one for each CPU, up to 16, shared among the processes.

    `processes` embed side by side, one on each GPU, or each with a share of the CPUs; what is
    written is the same. `ray` runs them on a cluster instead: its address, "auto" for the one that
    this machine is part of, or "local" to start one here; `processes` None is then all
    that there is room for. `verify` compares the encoder with its reference before anything is
    written, unless a certificate stands beside the checkpoint, and writes certificate.json.

    Units: `max_patches` and `token_budget` count patches, of an image and of a pack.
    Raises: WrongUse for what cannot be done as asked; CheckpointError; WriteError if the disk does
    not take it; VerificationError if the encoder is not what its reference is. An image that cannot
    be used is none of these: it is a row.
    """
    named = [photos] if isinstance(photos, (str, os.PathLike)) else photos
    options = Options(
        resize=resize,
        max_patches=max_patches,
        tokens=tokens,
        dtype_out=dtype_out,
        token_budget=token_budget,
        max_pixels=max_pixels,
        threads=min(16, max(1, count_cpus() // (processes or 1))) if threads is None else threads,
    )
    check_options(options)
    check_format(format)
    if processes is not None and processes < 1:
        raise WrongUse(f"processes is {processes}, but must be 1 or more.")
    folder = Path(out)
    check_usable(folder, overwrite=overwrite)
    listing = list_inputs([os.fspath(path) for path in named])
    if model is None and len(listing.inputs) > TRIAL_INPUTS:
        raise WrongUse(
            f"{len(listing.inputs)} inputs were found, but without a chosen model at most "
            f"{TRIAL_INPUTS} are embedded: the one that packvit brings is untrained. "
            'Choose one, for example model "apple/aimv2-large-patch14-native".'
        )
    if isinstance(model, Encoder):
        if (device, dtype, attention, revision, positions) != (
            (None, None, "auto", None, "checkpoint")
        ):
            raise WrongUse(
                "model is a loaded encoder, whose device, dtype, attention, revision and positions "
                "were chosen when it was loaded. Leave them out, or give the model's name."
            )
        if verify:
            raise WrongUse(
                "model is a loaded encoder, whose weights may have been trained since, so there is "
                "no reference to verify it by. Leave verify out, or give the model's name."
            )
        if ray is not None or processes not in (None, 1):
            raise WrongUse(
                "model is a loaded encoder, which lives in this process alone, so that no other "
                "can embed with it. Give the model's name, or leave processes and ray out."
            )
        encoder, weights = model, digest_weights(model)
    else:
        encoder = load_encoder(
            TRIAL_MODEL if model is None else model, device, dtype, attention, revision, positions
        )
        assert encoder.checkpoint
        weights = encoder.checkpoint.sha256()
    if verify and positions == "interpolate" and not encoder.family.reference.interpolates:
        raise WrongUse(
            'verify cannot vouch for positions="interpolate": no reference defines it for '
            f"{encoder.family.name}. Leave one of the two out."
        )
    options = fit_options(encoder, options, taps)
    certificate = vouch(encoder, weights) if verify else None
    described = describe(encoder, weights, options)
    manifest = draft(encoder, described, listing)
    name = encoder.checkpoint.name if encoder.checkpoint else ""
    job = Job(str(folder), options, described, positions, name)
    runner = choose_runner(encoder, job, processes, ray)
    del encoder  # a runner that embeds here holds it; the others need the memory
    tally = Tally(len(listing.inputs), progress)
    with claim(folder):
        found = take_up(folder, manifest, overwrite=overwrite)
        return run(runner, listing, folder, found, certificate, format, tally)


def draft(encoder: Encoder, described: Mapping[str, Any], listing: Listing) -> dict[str, Any]:
    """Return the manifest of a job of which nothing is written yet."""
    settings = {**described, "inputs_sha256": listing.sha256()}
    return {
        "format": FORMAT,
        "complete": False,
        "fingerprint": fingerprint(settings),
        "model": encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__,
        **settings,
        "inputs": len(listing.inputs),
        "ignored": listing.ignored,
        "certificate_sha256": None,
        "exports": {},
        "counts": None,
    }


def run(
    runner: Runner,
    listing: Listing,
    folder: Path,
    found: Found,
    certificate: Mapping[str, Any] | None,
    format: Format,
    tally: Tally,
) -> Summary:
    """Run all shards that the claimed folder does not hold."""
    manifest = found.manifest | {"complete": False, "counts": None}
    if certificate is not None:
        data = encode_certificate(certificate)
        put(folder / CERTIFICATE, data)
        manifest |= {"certificate_sha256": hashlib.sha256(data).hexdigest()}
    size = manifest["rows_per_part"]
    todo = -(-len(listing.inputs) // size) - len(found.kept)
    if todo:
        put(folder / MANIFEST, encode_manifest(manifest))
    for _, entry in sorted(found.kept.items()):
        tally.count(read_rows(folder, entry))
    kept_rows, kept_tokens = tally.progress.settled, tally.progress.tokens
    tally.begin(found.notes)
    start = time.perf_counter()
    missing = (s for s in shards(listing.inputs, size) if s.number not in found.kept)
    work = Work(missing, todo, folder, max(found.kept, default=0), tally.settle)
    if todo:
        with closing(runner(work)) as entries:
            for entry in entries:
                tally.update(committed=tally.progress.committed + entry.rows)
                assert tally.progress.committed == tally.progress.settled
    seconds = time.perf_counter() - start
    counts = {
        "rows": len(listing.inputs),
        "ok": tally.codes["ok"],
        "errors": tally.errors,
        "tokens": tally.progress.tokens,
        "parts": len(found.kept) + todo,
    }
    assert counts["rows"] == tally.progress.committed == tally.codes.total()
    if format == "npy":
        parts = [part_name(number) for number in range(counts["parts"])]
        width, recorded = manifest["config"]["width"], manifest.get("exports") or {}
        manifest |= {"exports": export(folder, parts, counts["rows"], width, recorded)}
    put(folder / MANIFEST, encode_manifest(manifest | {"complete": True, "counts": counts}))
    return Summary(
        folder=str(folder),
        model=str(manifest["model"]),
        fingerprint=str(manifest["fingerprint"]),
        rows=len(listing.inputs),
        ok=tally.codes["ok"],
        errors=tally.errors,
        examples={code: tally.examples[code] for code in tally.errors},
        ignored=listing.ignored,
        tokens=tally.progress.tokens,
        seconds=seconds,
        kept_rows=kept_rows,
        kept_tokens=kept_tokens,
    )


def put(path: Path, data: bytes) -> None:
    """Write a file unless it already holds these bytes: what is resumed in vain stays untouched."""
    if not (path.is_file() and path.read_bytes() == data):
        write_whole(path, data)


def shards(inputs: tuple[Input, ...], size: int) -> Iterator[Shard]:
    """Yield the inputs in their order, `size` at a time."""
    for number, start in enumerate(range(0, len(inputs), size)):
        yield Shard(number, inputs[start : start + size])


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
