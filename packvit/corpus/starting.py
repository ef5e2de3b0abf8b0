"""Start a job in a folder: list its inputs, load its encoder, lock the folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from packvit.corpus import UsageError
from packvit.corpus.completing import choose_codes, find_errors, run
from packvit.corpus.encode.context import check_decoding, make_context
from packvit.corpus.folder.layout import claim, read_manifest
from packvit.corpus.folder.names import CURRENT, names_of
from packvit.corpus.folder.ownership import check_usable
from packvit.corpus.folder.pending import describe, take_over
from packvit.corpus.folder.resume import compare, take_up
from packvit.corpus.folder.reuse import Reusing, describe_reuse, join_reuse, open_source
from packvit.corpus.folder.sharding import WHOLE, parse_shard, parts_of, rows_of
from packvit.corpus.folder.sizes import describe_size, row_bytes
from packvit.corpus.folder.stores import Folder, StorePath, find_folder
from packvit.corpus.folder.swapping import clean
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.loading import choose_encoder, outline_encoder
from packvit.corpus.manifest import describe_job, draft, rows_before
from packvit.corpus.progress import Summary, Tally, Tell
from packvit.corpus.runners.choosing import choose_devices, choose_runner
from packvit.corpus.runners.embedder import Job
from packvit.corpus.runners.host import Pool
from packvit.corpus.runners.launching import Launched
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
    model, processes = choice.model, how.processes
    part_of = WHOLE if how.shard is None else parse_shard(how.shard)
    if how.rows_per_part is not None:
        options = replace(options, rows_per_part=how.rows_per_part)
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
    notes = () if updates else take_over(folder, recorded, listing)
    notes += listing.notes
    options = replace(options, keep=listing.settle_kept(inputs.keep))
    if model is None and len(listing) > TRIAL_INPUTS:
        raise UsageError(
            f"{len(listing)} inputs were found, but without a chosen model at most "
            f"{TRIAL_INPUTS} are embedded, since the default model is small. "
            'Choose one, for example `model="apple/aimv2-large-patch14-native"`.'
        )
    complete = bool(held.get("complete"))
    with options.decoders() as decoders, gather(how) as pool:
        if how.here and not complete:
            decoders.start(len(listing))  # while the model is loaded
        engine = None
        if (
            how.here
            and options.decode == "gpu"
            and torch.cuda.is_available()
            and choice.options.device in (None, "cuda")
        ):
            engine = begin_engine(torch.device("cuda"))  # while the model is loaded
        if pool and not how.verify:
            encoder = outline_encoder(choice)
            devices = choose_devices(encoder.device, pool.count)
            rows = how.rows_per_part or rows_before(recorded) or FEWEST_ROWS
            pool.keep(-(-len(listing) // rows))
            free = free_memory(encoder.device)  # before others load the weights there
            if free is not None:
                free = max(0, free - sum(each.nbytes for each in encoder.parameters()))
            pool.load(pin(choice, encoder), options, devices)
            assert encoder.checkpoint is not None
            weights = encoder.checkpoint.sha256()
        else:
            encoder, weights = choose_encoder(choice, verify=how.verify)
            free = free_memory(encoder.device)
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
        context = make_context(encoder, options, decoders, engine) if how.here else None
        if context is None:
            check_decoding(encoder, options)
        check_memory(encoder, options, free)
        certificate = vouch(encoder, weights) if how.verify else None
        format_of_folder = (CURRENT if how.overwrite else names_of(folder)).format
        manifest = draft(encoder, described, listing, format_of_folder) | part_of.entry
        name = encoder.checkpoint.name if encoder.checkpoint else ""
        each = row_bytes(options.outputs(encoder.config), typical_patches(encoder, options))
        job = Job(str(folder), options, described, choice.options.positions, name)
        runner = choose_runner(context, job, pool, processes, how.ray)
        pinned, device = pin(choice, encoder), encoder.device
        del encoder, context  # only a runner in this process keeps them; the others need the memory
        if pool:
            if how.verify:
                torch.cuda.empty_cache()  # frees what the encoder took; nothing without CUDA
                pool.load(pinned, options, choose_devices(device, pool.count))
            pool.keep(len(parts_of(manifest)))
            pool.give(replace(job, embedders=pool.count))
            if not complete:
                pool.await_ready()  # what loading refuses is refused before anything is written
        tally = Tally(rows_of(manifest), progress, options.token_budget)
        with nullcontext(folder) if updates else claim(folder) as folder:
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


@contextmanager
def gather(how: RunOptions) -> Iterator[Pool | None]:
    """Start the processes that embed on this host, unless they are started; None if this does."""
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
    """Return the choice of the very commit that an encoder comes from: a branch may move."""
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
    """Return whether two names are of one folder."""
    if isinstance(first, StorePath) or isinstance(second, StorePath):
        return first == second
    return first.exists() and second.exists() and first.samefile(second)
