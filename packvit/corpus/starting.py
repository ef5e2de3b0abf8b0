"""Run a job in a folder: list its inputs, load its encoder, lock the folder, complete it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from packvit.corpus import UsageError
from packvit.corpus.completing import choose_codes, find_errors, run
from packvit.corpus.decode.queue import Decoders
from packvit.corpus.encode.context import check_decoding, make_context
from packvit.corpus.folder.layout import claim, read_manifest
from packvit.corpus.folder.names import CURRENT, names_of
from packvit.corpus.folder.ownership import check_usable
from packvit.corpus.folder.pending import describe, take_over
from packvit.corpus.folder.resume import Resumed, compare, take_up
from packvit.corpus.folder.reuse import Reusing, describe_reuse, join_reuse, open_source
from packvit.corpus.folder.sharding import WHOLE, parse_shard, parts_of, rows_of, shard_of
from packvit.corpus.folder.sizes import describe_size, row_bytes
from packvit.corpus.folder.stores import Folder, StorePath, find_folder
from packvit.corpus.folder.swapping import clean
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.loading import choose_encoder, outline_encoder
from packvit.corpus.manifest import describe_job, draft, rows_before
from packvit.corpus.progress import Summary, Tally, Tell
from packvit.corpus.runners.choosing import choose_devices, choose_runner
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.host import Pool
from packvit.corpus.runners.launching import Launched
from packvit.corpus.runners.order import Runner
from packvit.corpus.settings import (
    FEWEST_ROWS,
    EmbedOptions,
    InputOptions,
    ModelChoice,
    RunOptions,
    check_memory,
    choose_rows,
    fit_options,
    typical_patches,
)
from packvit.encoder import Encoder
from packvit.gpu.decoder import begin_engine
from packvit.model.device import name_device
from packvit.model.memory import free_memory
from packvit.verification.verify import vouch

TRIAL_INPUTS = 1000  # the most inputs of a job without a chosen model


class Prepared(NamedTuple):
    """A job whose encoder is known, before anything is written."""

    job: Job
    manifest: dict[str, Any]
    reusing: Reusing
    certificate: Mapping[str, Any] | None
    runner: Runner
    choice: ModelChoice  # with the commit that the encoder comes from
    device: torch.device
    row_bytes: int


def run_in(
    folder: Folder,
    inputs: InputOptions,
    choice: ModelChoice,
    options: EmbedOptions,
    how: RunOptions,
    progress: Tell | None,
    *,
    updates: bool,
) -> Summary:
    """Do the job in a folder; one that `updates` another is claimed already."""
    check_usable(folder, overwrite=how.overwrite)
    held = read_manifest(folder) or {}
    recorded = {} if how.overwrite else held
    listing = list_inputs(
        inputs.photos,
        inputs.lists,
        column=inputs.column,
        image_column=inputs.image_column,
        keep=inputs.keep,
        known=recorded.get("inputs_sha256"),
    )
    notes = (() if updates else take_over(folder, recorded, listing)) + listing.notes
    options = replace(options, keep=listing.settle_kept(inputs.keep))
    check_trial(choice, listing)
    complete = bool(held.get("complete"))
    with options.decoders() as decoders, gather(how) as pool:
        if how.here and not complete:
            decoders.start(len(listing))  # while the model is loaded
        ready = prepare(folder, listing, recorded, choice, options, how, decoders, pool)
        if pool:
            hand_over(ready, pool, load=how.verify)
            if not complete:
                pool.await_ready()  # what loading refuses is refused before anything is written
        tally = Tally(rows_of(ready.manifest), progress, options.token_budget)
        with nullcontext(folder) if updates else claim(folder) as folder:
            if not updates:
                clean(folder)
            # Another update was begun there, of inputs that have changed since.
            stale = updates and bool(compare(recorded, json.loads(json.dumps(ready.manifest))))
            found = take_up(
                folder,
                ready.manifest,
                overwrite=how.overwrite or stale,
                inputs=describe(listing.gone),
            )
            found = begin(folder, found, ready, listing, notes)
            again = find_errors(folder, found.kept, choose_codes(how.retry_errors))
            certificate, reusing = ready.certificate, ready.reusing
            return run(
                ready.runner, listing, folder, found, again, certificate, how.format, reusing, tally
            )


def check_trial(choice: ModelChoice, listing: Listing) -> None:
    """Refuse a large job whose model nobody chose.

    Raises: UsageError.
    """
    if choice.model is None and len(listing) > TRIAL_INPUTS:
        raise UsageError(
            f"{len(listing)} inputs were found, but without a chosen model at most "
            f"{TRIAL_INPUTS} are embedded, since the default model is small. "
            'Choose one, for example `model="apple/aimv2-large-patch14-native"`.'
        )


def prepare(
    folder: Folder,
    listing: Listing,
    recorded: Mapping[str, Any],
    choice: ModelChoice,
    options: EmbedOptions,
    how: RunOptions,
    decoders: Decoders,
    pool: Pool | None,
) -> Prepared:
    """Load the encoder, here or in `pool`, and settle everything that the manifest records.

    Raises: UsageError for options that do not go with the encoder or each other; CheckpointError;
    VerificationError.
    """
    engine = None
    on_gpu = torch.cuda.is_available() and choice.options.device in (None, "cuda")
    if how.here and options.decode == "gpu" and on_gpu:
        engine = begin_engine(torch.device("cuda"))  # while the model is loaded
    if pool and not how.verify:
        rows = how.rows_per_part or rows_before(recorded) or FEWEST_ROWS
        pool.keep(-(-len(listing) // rows))
        encoder, weights, free = load_in(pool, choice, options)
    else:
        encoder, weights = choose_encoder(choice, verify=how.verify)
        free = free_memory(encoder.device)
    part_of = WHOLE if how.shard is None else parse_shard(how.shard)
    options = fit_options(encoder, options)
    if not recorded or "text_space" in recorded:  # older folders are finished without it
        options = replace(options, text_space=encoder.text_space)
    kind = encoder.device if part_of == WHOLE else None
    large = options.tokens or bool(options.taps)
    rows = how.rows_per_part or rows_before(recorded)
    rows = rows or choose_rows(kind, len(listing), large=large)
    options = replace(options, rows_per_part=rows)
    described = describe_job(encoder, weights, options)
    reusing = choose_reuse(folder, how, described, name_device(encoder.device))
    options = replace(options, reuse=reusing.reuse(folder))
    context = make_context(encoder, options, decoders, engine) if how.here else None
    if context is None:
        check_decoding(encoder, options)
    check_memory(encoder, options, free)
    certificate = vouch(encoder, weights) if how.verify else None
    format_of_folder = (CURRENT if how.overwrite else names_of(folder)).format
    manifest = draft(encoder, described, listing, format_of_folder) | part_of.entry
    name = encoder.checkpoint.name if encoder.checkpoint else ""
    job = Job(str(folder), options, described, choice.options.positions, name)
    # Only a runner in this process keeps the encoder; the others need the memory.
    return Prepared(
        job,
        manifest,
        reusing,
        certificate,
        choose_runner(context, job, pool, how.processes, how.ray),
        pin(choice, encoder),
        encoder.device,
        row_bytes(options.outputs(encoder.config), typical_patches(encoder, options)),
    )


def load_in(
    pool: Pool, choice: ModelChoice, options: EmbedOptions
) -> tuple[Encoder, str, int | None]:
    """Have the processes load the encoder, while this one reads only its outline.

    Returns the outline, the digest of the weights, and the bytes left free beside them, if known.
    """
    encoder = outline_encoder(choice)
    free = free_memory(encoder.device)  # before others load the weights there
    if free is not None:
        free = max(0, free - sum(each.nbytes for each in encoder.parameters()))
    pool.load(pin(choice, encoder), options, choose_devices(encoder.device, pool.count))
    assert encoder.checkpoint is not None
    return encoder, encoder.checkpoint.sha256(), free


def hand_over(ready: Prepared, pool: Pool, *, load: bool) -> None:
    """Give the processes the job; if `load`, first the encoder that was verified in this one."""
    if load:
        torch.cuda.empty_cache()  # frees what the encoder took; nothing without CUDA
        pool.load(ready.choice, ready.job.options, choose_devices(ready.device, pool.count))
    pool.keep(len(parts_of(ready.manifest)))
    pool.give(replace(ready.job, embedders=pool.count))


def begin(
    folder: Folder, found: Resumed, ready: Prepared, listing: Listing, notes: tuple[str, ...]
) -> Resumed:
    """Return what a claimed folder holds, with the notes and entries with which the job begins."""
    rows = rows_of(ready.manifest)
    todo = rows - sum(entry.rows for entry in found.kept.values())
    empty = ()
    if not rows and len(listing):
        part_of = shard_of(ready.manifest)
        empty = (f"Shard {part_of} has no rows: the job has fewer parts than shards.",)
    size = describe_size(folder, todo, ready.row_bytes)
    devices = {name_device(ready.device), *found.manifest.get("device_names", ())}
    reused = join_reuse([found.manifest.get("reused"), ready.reusing.entry])
    return replace(
        found,
        notes=(*empty, *notes, *found.notes, *size),
        begun={"device_names": sorted(devices), **reused},
    )


@contextmanager
def gather(how: RunOptions) -> Iterator[Pool | None]:
    """Yield the processes that embed on this host, or None if this process embeds."""
    if how.here or how.ray is not None:
        yield None
        return
    with how.launched or Launched(how.processes or 1) as launched:
        pool = Pool(launched.take())
    try:
        yield pool
    finally:
        pool.close()


def pin(choice: ModelChoice, encoder: Encoder) -> ModelChoice:
    """Return the choice with the commit that the encoder comes from: a branch may move."""
    revision = encoder.checkpoint.revision if encoder.checkpoint else None
    return replace(choice, revision=revision)


def choose_reuse(
    folder: Folder, how: RunOptions, described: Mapping[str, Any], device_name: str
) -> Reusing:
    """Return the folders whose rows a job in `folder` takes over.

    Raises: UsageError if one cannot be used.
    """
    found = [find_folder(name, name="reuse") for name in how.reuse]
    if any(is_same(path, folder) for path in found):
        advice = "Choose another `out`" if isinstance(folder, StorePath) else "Ask for `update`"
        raise UsageError(f"reuse names {folder}, the folder of this job. {advice} instead.")
    if found and isinstance(folder, StorePath) and how.ray not in (None, "local"):
        raise UsageError(
            "reuse cannot go with `ray` where `out` is in an object store, since all hosts need "
            "its index. Leave one of them out, or give --shard to each host instead of --ray."
        )
    across = how.reuse_across_versions
    sources = [open_source(path, described, across_versions=across) for path in found]
    entry = describe_reuse(sources, described, device_name, trust_mtime=how.trust_mtime)
    return Reusing(tuple(sources), entry, how.trust_mtime)


def is_same(first: Folder, second: Folder) -> bool:
    """Return whether two names mean the same folder."""
    if isinstance(first, StorePath) or isinstance(second, StorePath):
        return first == second
    return first.exists() and second.exists() and first.samefile(second)
