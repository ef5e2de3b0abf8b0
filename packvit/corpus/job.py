"""`packvit.embed`: photographs in, a feature folder out.

The job lists its inputs, loads the encoder and locks the folder (`starting.py`), and runs the
shards that the folder does not hold yet (`completing.py`). Every input ends as one row, and
committed parts stay whole however the job ends.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from packvit.config import GridPolicy
from packvit.corpus import UsageError
from packvit.corpus.completing import choose_codes
from packvit.corpus.decode.prepare import Decode
from packvit.corpus.decode.queue import IMAGE_TIMEOUT, PIXELS_IN_FLIGHT
from packvit.corpus.folder.exports import Format, check_format
from packvit.corpus.folder.layout import read_manifest
from packvit.corpus.folder.parts import DtypeOut, check_keep, find_keep_flaw
from packvit.corpus.folder.sharding import WHOLE, parse_shard
from packvit.corpus.folder.stores import StorePath, find_folder
from packvit.corpus.folder.swapping import restore, updating
from packvit.corpus.manifest import rows_before
from packvit.corpus.progress import Summary, Tell
from packvit.corpus.runners.launching import Launched
from packvit.corpus.settings import (
    EmbedOptions,
    InputOptions,
    ModelChoice,
    RunOptions,
    check_options,
)
from packvit.corpus.starting import run_in
from packvit.encoder import Encoder
from packvit.gpu.nvjpeg import ask_for_queues
from packvit.images.decode import MAX_PIXELS
from packvit.images.resize import Resize
from packvit.model.options import LoadOptions

MOST_WORKERS = 16  # that one process starts by default


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
    processes: int | Launched | None = None,
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
    rows again that are errors, of all codes or of those named, and keeps all others. `shard` "3/64"
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
    the workers decode all other images. "fast" has Pillow decode JPEGs that are far larger than
    they are resized to at a half, a quarter or an eighth of their size: features differ a little,
    so such a job neither resumes nor takes over rows of the others. If a loaded encoder is on the
    GPU already, set CUDA_DEVICE_MAX_CONNECTIONS=32 before anything uses CUDA; otherwise it is set
    here.

    `keep` names columns that come with the photographs and become columns of the parts: the keys of
    a .json beside an image of the same name in a tar, a zip or a local folder ("txt" and "cls" for
    files called so), columns of Parquet files of images and of lists that are tables, and of a
    folder's metadata.jsonl or .csv, as datasets writes them. A job resumes only with the same
    values.

    `processes` is the number of processes that embed, one for each GPU, or each with a share of
    the CPUs, or such processes that are started already; each has its own workers and pixels in
    flight, and the output is the same. `ray` runs
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
    try:
        loading = LoadOptions(
            device=device,
            dtype=dtype,
            attention=attention,
            positions=positions,
            invariant=invariant,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    choice = ModelChoice(model=model, revision=revision, options=loading)
    launched = processes if isinstance(processes, Launched) else None
    count = processes.count if isinstance(processes, Launched) else processes
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
        workers=fair_workers(count) if workers is None else workers,
        pixels_in_flight=pixels_in_flight,
    )
    how = RunOptions(
        format=format,
        rows_per_part=rows_per_part,
        processes=count,
        launched=launched,
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
    folder = find_folder(out)
    if how.update and isinstance(folder, StorePath):
        raise UsageError(
            f"{folder} is not updated: an object store swaps no folders. Give `reuse` {folder} and "
            "another `out`, which takes its rows over."
        )
    restore(folder)
    old = read_manifest(folder) if how.update else None
    if old is None or isinstance(folder, StorePath):
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


def fair_workers(processes: int | None) -> int:
    """Return the decode workers for each process, when processes share the CPUs."""
    return min(MOST_WORKERS, max(1, count_cpus() // (processes or 1)))


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
