"""`packvit.embed`: photographs in, a feature folder out.

The job lists its inputs, loads the encoder, locks the folder, and runs the shards that the folder
does not hold yet. Every input ends as one row, and committed parts stay whole however the job ends.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from packvit.config import GridPolicy
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Decode
from packvit.corpus.decode.queue import IMAGE_TIMEOUT, PIXELS_IN_FLIGHT
from packvit.corpus.encode.context import make_context
from packvit.corpus.encode.filling import Shard
from packvit.corpus.folder.exports import Format, check_format, export
from packvit.corpus.folder.layout import (
    Commit,
    claim,
    encode_certificate,
    encode_manifest,
    fingerprint,
    put,
    read_manifest,
)
from packvit.corpus.folder.names import CURRENT, names_of, part_number
from packvit.corpus.folder.parts import DtypeOut, Outputs, check_keep, find_keep_flaw
from packvit.corpus.folder.pending import describe, remove_inputs, take_over, write_inputs
from packvit.corpus.folder.resume import Resumed, check_usable, compare, read_rows, take_up
from packvit.corpus.folder.reuse import (
    Reusing,
    describe_reuse,
    has_mtimes,
    indexed,
    join_reuse,
    open_source,
    write_mtimes,
)
from packvit.corpus.folder.sharding import WHOLE, parse_shard, parts_of, rows_of
from packvit.corpus.folder.sizes import describe_size, row_bytes
from packvit.corpus.folder.swapping import clean, restore, updating
from packvit.corpus.inputs.addresses import check_local
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.retries import BOUND
from packvit.corpus.progress import Summary, Tally, Tell
from packvit.corpus.runners import choose_runner
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.order import Runner, Work
from packvit.corpus.settings import (
    EmbedOptions,
    InputOptions,
    ModelChoice,
    RunOptions,
    check_memory,
    check_options,
    choose_rows,
    describe_job,
    digest_weights,
    fit_options,
    load_encoder,
    typical_patches,
)
from packvit.encoder import Encoder
from packvit.gpu.decoder import begin_engine
from packvit.gpu.nvjpeg import ask_for_queues
from packvit.images.decode import CODES, MAX_PIXELS
from packvit.images.resize import Resize
from packvit.model.device import name_device
from packvit.model.memory import free_memory
from packvit.verification.verify import vouch

MOST_WORKERS = 16  # that one process starts by default
TRIAL_INPUTS = 1000  # the most inputs of a job without a chosen model


def embed(
    photos: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    lists: Sequence[str | os.PathLike[str]] = (),
    column: str = "path",
    image_column: str = "image",
    keep: Sequence[str] = (),
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | Encoder | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "auto",
    revision: str | None = None,
    positions: GridPolicy = "checkpoint",
    invariant: bool = False,
    resize: Resize | None = None,
    max_patches: int | None = None,
    tokens: bool = False,
    taps: Sequence[int] = (),
    dtype_out: DtypeOut | None = None,
    format: Format = "parquet",
    token_budget: int = 16384,
    rows_per_part: int | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: Decode = "pil",
    image_timeout: float = IMAGE_TIMEOUT,
    workers: int | None = None,
    pixels_in_flight: int = PIXELS_IN_FLIGHT,
    processes: int | None = None,
    ray: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    retry_errors: bool | Sequence[str] = False,
    shard: str | None = None,
    reuse: Sequence[str | os.PathLike[str]] = (),
    reuse_across_versions: bool = False,
    update: bool = False,
    trust_mtime: bool = False,
    progress: Tell | None = None,
) -> Summary:
    """Embed photographs into the feature folder `out`: one row for every input.

    If `out` holds a part of the same job, the job resumes after it; if it holds all of it, no image
    is read. `overwrite` removes what packvit wrote there and starts over. `retry_errors` does the
    rows anew that are errors, of all codes or of those named, and keeps all others. `shard` "3/64"
    does the third of 64 runs of the job's parts; `packvit.merge` puts the 64 folders together.

    Rows of the folders `reuse` whose photographs have the same bytes are taken over, if they are ok
    and all that decides their features is equal, versions of packages included unless
    `reuse_across_versions`. With `invariant`, which gives an image the same bits in any pack, the
    result is byte for byte that of a fresh job; where it may not be, the manifest says `reused`.
    `update` does that with `out` itself: the new folder is made beside it and swapped in whole.
    `trust_mtime` does not even read a file whose name, size and time of change are those that a
    job with `trust_mtime` recorded.

    `photos` are folders to be walked, files, patterns, tar, zip and Parquet files of images, and
    URLs of these; `lists` are files of paths. A list that is a table has its paths in `column`; a
    Parquet file of images has their bytes in `image_column`. `model` is a checkpoint's name or
    folder, or a loaded encoder, whose `device` to `positions` are already chosen; None is "tiny",
    the small encoder that comes with packvit. `tokens` and `taps` (layers, negative ones from the
    end) also write the features of every patch. All features are written as `dtype_out`; None is
    float32 for the vectors of images and float16 for those of patches. `format` "npy" also writes a
    NumPy matrix of the pooled features once all parts are written. `rows_per_part` inputs share a
    file, which is written once all are embedded: what a killed job loses is less than that for each
    process. None is what the folder has already, else 64 on a CPU or with tokens, and 1024 on a
    GPU or of a shard, or less for a job of few inputs. `workers` is the number of decoding
    processes; None is one for each CPU, up to 16. At most `pixels_in_flight` pixels are decoded or
    waiting at a time, and an image that takes longer than `image_timeout` becomes an error.
    `decode` "gpu" decodes JPEGs on the encoder's GPU if the result equals Pillow's bit for bit;
    the workers decode all other images. If a loaded encoder is on the GPU already, set
    CUDA_DEVICE_MAX_CONNECTIONS=32 before anything uses CUDA; otherwise it is set here.

    `keep` names columns that come with the photographs and become columns of the parts: the keys of
    a .json beside an image of the same key in a tar ("txt" and "cls" for members called so),
    columns of Parquet files of images and of lists that are tables, and of a folder's
    metadata.jsonl or .csv, as datasets writes them. A job resumes only with the same values.

    `processes` is the number of processes that embed, one for each GPU, or each with a share of
    the CPUs; each has its own workers and pixels in flight, and the output is the same. `ray` runs
    them on a Ray cluster instead: its address, "auto" for the one that this machine is part of, or
    "local" to start one here; `processes` None then uses the whole cluster. `verify` compares the
    encoder with its reference before anything is written, unless a certificate lies beside the
    checkpoint, and writes _certificate.json.

    Units: `max_patches` and `token_budget` count patches, of an image and of a pack;
    `image_timeout` seconds.
    Raises: UsageError for arguments that cannot be used; CheckpointError; WriteError if a file
    cannot be written; DecoderError if no worker can be started; VerificationError if the encoder
    differs from its reference. An image that cannot be used raises nothing: its row says why.
    """
    named = [photos] if isinstance(photos, (str, os.PathLike)) else photos
    inputs = InputOptions(
        photos=tuple(os.fspath(path) for path in named),
        lists=tuple(os.fspath(path) for path in lists),
        column=column,
        image_column=image_column,
        keep=check_keep(keep),
    )
    choice = ModelChoice(
        model=model,
        device=device,
        dtype=dtype,
        attention=attention,
        revision=revision,
        positions=positions,
        invariant=invariant,
    )
    options = EmbedOptions(
        resize=resize,
        max_patches=max_patches,
        tokens=tokens,
        taps=tuple(taps),
        dtype_out=dtype_out or "float16",
        vector_dtype=dtype_out or "float32",
        token_budget=token_budget,
        max_pixels=max_pixels,
        decode=decode,
        image_timeout=image_timeout,
        workers=fair_workers(processes) if workers is None else workers,
        pixels_in_flight=pixels_in_flight,
    )
    how = RunOptions(
        format=format,
        rows_per_part=rows_per_part,
        processes=processes,
        ray=ray,
        verify=verify,
        overwrite=overwrite,
        retry_errors=retry_errors,
        shard=shard,
        reuse=tuple(os.fspath(path) for path in reuse),
        reuse_across_versions=reuse_across_versions,
        update=update,
        trust_mtime=trust_mtime,
    )
    return run_job(out, inputs, choice, options, how, progress)


def run_job(
    out: str | os.PathLike[str],
    inputs: InputOptions,
    choice: ModelChoice,
    options: EmbedOptions,
    how: RunOptions,
    progress: Tell | None,
) -> Summary:
    """Do what `embed` says."""
    model, processes = choice.model, how.processes
    if how.rows_per_part is not None:
        options = replace(options, rows_per_part=how.rows_per_part)
    check_options(options)
    check_format(how.format)
    part_of = WHOLE if how.shard is None else parse_shard(how.shard)
    if part_of != WHOLE and how.format != "parquet":
        raise UsageError(
            f'format is "{how.format}", which a shard alone cannot have. Give it to '
            "`packvit merge`."
        )
    choose_codes(how.retry_errors)
    if how.trust_mtime and part_of != WHOLE:
        raise UsageError("trust_mtime cannot go with `shard`: leave one of them out.")
    if options.decode == "gpu":
        ask_for_queues()
    if processes is not None and processes < 1:
        raise UsageError(f"processes is {processes}, but must be 1 or more.")
    if isinstance(model, Encoder) and not how.here:
        raise UsageError(
            "model is a loaded encoder, which only this process can use. Give the model's name, or "
            "leave `processes` and `ray` out."
        )
    if how.update and (how.overwrite or part_of != WHOLE):
        raise UsageError("update cannot go with `overwrite` or `shard`: leave them out.")
    check_local(out)
    folder = Path(out)
    restore(folder)
    old = read_manifest(folder) if how.update else None
    if old is None:
        return run_in(folder, inputs, choice, options, how, progress, updates=False)
    if "shard" in old:
        raise UsageError(f"{folder} is not updated: it holds a shard alone. Merge it first.")
    exported = bool(old.get("exports"))
    if not inputs.keep and not find_keep_flaw(old):
        inputs = replace(inputs, keep=tuple(name for name, _ in old.get("keep", ())))
    how = replace(
        how,
        reuse=(str(folder), *how.reuse),
        rows_per_part=how.rows_per_part or rows_before(old),
        format="npy" if exported else how.format,
    )
    with updating(folder.resolve()) as target:
        summary = run_in(target, inputs, choice, options, how, progress, updates=True)
    return replace(summary, folder=str(folder))


def run_in(
    folder: Path,
    inputs: InputOptions,
    choice: ModelChoice,
    options: EmbedOptions,
    how: RunOptions,
    progress: Tell | None,
    *,
    updates: bool,
) -> Summary:
    """Do the job in a folder; one that `updates` another is claimed already."""
    model, processes = choice.model, how.processes
    part_of = WHOLE if how.shard is None else parse_shard(how.shard)
    if how.rows_per_part is not None:
        options = replace(options, rows_per_part=how.rows_per_part)
    check_usable(folder, overwrite=how.overwrite)
    recorded = {} if how.overwrite else read_manifest(folder) or {}
    listing = list_inputs(
        inputs.photos,
        inputs.lists,
        column=inputs.column,
        image_column=inputs.image_column,
        keep=inputs.keep,
        known=recorded.get("inputs_sha256"),
    )
    notes = () if updates else take_over(folder, recorded, listing)
    notes += listing.notes
    options = replace(options, keep=listing.settle_kept(inputs.keep))
    if model is None and len(listing) > TRIAL_INPUTS:
        raise UsageError(
            f"{len(listing)} inputs were found, but without a chosen model at most "
            f"{TRIAL_INPUTS} are embedded, since the default model is small. "
            'Choose one, for example `model="apple/aimv2-large-patch14-native"`.'
        )
    with options.decoders() as decoders:
        if how.here and not (read_manifest(folder) or {}).get("complete"):
            decoders.start(len(listing))  # while the model is loaded
        engine = None
        if (
            options.decode == "gpu"
            and torch.cuda.is_available()
            and choice.device in (None, "cuda")
        ):
            engine = begin_engine(torch.device("cuda"))  # while the model is loaded
        encoder, weights = choose_encoder(choice, verify=how.verify)
        options = fit_options(encoder, options)
        if not recorded or "text_space" in recorded:  # folders of before are finished as they are
            options = replace(options, text_space=encoder.text_space)
        if how.rows_per_part is None:
            large = options.tokens or bool(options.taps)
            kind = encoder.device if part_of == WHOLE else None
            rows = rows_before(recorded) or choose_rows(kind, len(listing), large=large)
            options = replace(options, rows_per_part=rows)
        described = describe_job(encoder, weights, options)
        device_name = name_device(encoder.device)
        reusing = choose_reuse(folder, how, described, device_name)
        options = replace(options, reuse=reusing.reuse(folder))
        context = make_context(encoder, options, decoders, engine)
        check_memory(encoder, options, free_memory(encoder.device))
        certificate = vouch(encoder, weights) if how.verify else None
        format_of_folder = (CURRENT if how.overwrite else names_of(folder)).format
        manifest = draft(encoder, described, listing, format_of_folder) | part_of.entry
        name = encoder.checkpoint.name if encoder.checkpoint else ""
        each = row_bytes(options.outputs(encoder.config), typical_patches(encoder, options))
        job = Job(str(folder), options, described, choice.positions, name)
        runner = choose_runner(context, job, processes, how.ray)
        del encoder, context  # only a runner in this process keeps them; the others need the memory
        tally = Tally(rows_of(manifest), progress, options.token_budget)
        with nullcontext() if updates else claim(folder):
            if not updates:
                clean(folder)
            # Another update was begun there, of inputs that have changed since.
            stale = updates and bool(compare(recorded, json.loads(json.dumps(manifest))))
            differ = describe(listing.gone)
            found = take_up(folder, manifest, overwrite=how.overwrite or stale, inputs=differ)
            found = replace(found, notes=(*notes, *found.notes))
            if not rows_of(manifest) and len(listing):
                notes = (f"Shard {part_of} has no rows: the job has fewer parts than shards.",)
                found = replace(found, notes=(*notes, *found.notes))
            todo = rows_of(manifest) - sum(entry.rows for entry in found.kept.values())
            size = describe_size(folder, todo, each)
            found = replace(found, notes=(*found.notes, *size))
            again = find_errors(folder, found.kept, choose_codes(how.retry_errors))
            devices = {device_name, *found.manifest.get("device_names", ())}
            begun = join_reuse([found.manifest.get("reused"), reusing.entry])
            found = replace(found, begun={"device_names": sorted(devices), **begun})
            return run(
                runner, listing, folder, found, again, certificate, how.format, reusing, tally
            )


def choose_reuse(
    folder: Path, how: RunOptions, described: Mapping[str, Any], device_name: str
) -> Reusing:
    """Return the folders whose rows a job in `folder` takes over.

    Raises: UsageError if one cannot be used.
    """
    found = [Path(name) for name in how.reuse]
    if folder.exists() and any(path.exists() and path.samefile(folder) for path in found):
        raise UsageError(f"reuse names {folder}, the folder of this job. Ask for `update` instead.")
    across = how.reuse_across_versions
    sources = [open_source(path, described, across_versions=across) for path in found]
    entry = describe_reuse(sources, described, device_name, trust_mtime=how.trust_mtime)
    return Reusing(tuple(sources), entry, how.trust_mtime)


def choose_encoder(choice: ModelChoice, *, verify: bool) -> tuple[Encoder, str]:
    """Return the loaded encoder, and the digest of its weights.

    Raises: UsageError for arguments that do not go together; CheckpointError.
    """
    if isinstance(choice.model, Encoder):
        if choice != ModelChoice(model=choice.model):
            raise UsageError(
                "model is a loaded encoder, whose device, dtype, attention, revision and positions "
                "were chosen when it was loaded. Leave them out, or give the model's name."
            )
        if verify:
            raise UsageError(
                "model is a loaded encoder, whose weights may have been trained since, so it has "
                "no reference. Leave `verify` out, or give the model's name."
            )
        encoder, weights = choice.model, digest_weights(choice.model)
    else:
        encoder, weights = load_encoder(choice)
    if verify and choice.positions == "interpolate" and not encoder.family.reference.interpolates:
        raise UsageError(
            'verify cannot check positions="interpolate": no reference defines it for '
            f"{encoder.family.name}. Leave one of the two out."
        )
    return encoder, weights


def rows_before(recorded: Mapping[str, Any]) -> int | None:
    """Return the rows of a part of the job that a manifest records, or None if it says none."""
    rows = recorded.get("rows_per_part")
    return rows if type(rows) is int and rows > 0 else None


def draft(
    encoder: Encoder, described: Mapping[str, Any], listing: Listing, format: str
) -> dict[str, Any]:
    """Return the manifest of a job before anything is written."""
    settings = {**described, "inputs_sha256": listing.sha256()}
    settings |= {"kept_sha256": listing.kept_sha256()} if "keep" in described else {}
    return {
        "format": format,
        "complete": False,
        "fingerprint": fingerprint(settings),
        "model": encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__,
        **settings,
        "inputs": len(listing),
        "ignored": listing.ignored,
        "root": listing.root,
        "retries": asdict(BOUND),
        "device_names": [name_device(encoder.device)],  # others that embed parts are added
        "certificate_sha256": None,
        "exports": {},
        "counts": None,
    }


def run(
    runner: Runner,
    listing: Listing,
    folder: Path,
    found: Resumed,
    again: Mapping[int, tuple[int, ...]],
    certificate: Mapping[str, Any] | None,
    format: Format,
    reusing: Reusing,
    tally: Tally,
) -> Summary:
    """Run all shards that the locked folder does not hold, and commit them in order.

    `again` are the rows to be done anew, by the number of their part.
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
    folder: Path,
    kept: Mapping[int, Commit],
    again: Mapping[int, tuple[int, ...]],
) -> Iterator[Shard]:
    """Yield the inputs of parts in order; of parts that are kept, those to do again.

    A part has `size` inputs, and the last what is left.
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
    """Return the error codes whose rows are done again.

    Raises: UsageError for a code that rows do not have.
    """
    if isinstance(retry, bool):
        return frozenset(CODES) if retry else frozenset()
    named = (retry,) if isinstance(retry, str) else tuple(retry)
    if unknown := [code for code in named if code not in CODES]:
        raise UsageError(f'retry_errors names "{unknown[0]}". Choose of: {", ".join(CODES)}.')
    return frozenset(named)


def find_errors(
    folder: Path, kept: Mapping[int, Commit], codes: frozenset[str]
) -> dict[int, tuple[int, ...]]:
    """Return the places of the rows with such codes, by the number of their part."""
    found = {}
    for number, entry in kept.items() if codes else ():
        rows = read_rows(folder, entry) if entry.errors else ()
        if places := tuple(place for place, row in enumerate(rows) if row.status in codes):
            found[number] = places
    return found


def fair_workers(processes: int | None) -> int:
    """Return the decode workers for each process, when processes share the CPUs."""
    return min(MOST_WORKERS, max(1, count_cpus() // (processes or 1)))


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
