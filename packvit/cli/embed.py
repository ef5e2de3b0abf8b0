"""`packvit embed`: embed photographs into a feature folder, the main job."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click

from packvit.cli import DONE_WITH_ERRORS, exit_code
from packvit.cli.command import Command
from packvit.cli.models import MODEL_HELP, explaining, full_name
from packvit.cli.options import (
    COUNT,
    device_option,
    dtype_option,
    max_patches_option,
    positions_option,
    resize_option,
    revision_option,
)
from packvit.cli.progress import Meter, show_progress
from packvit.cli.summary import as_object, as_table
from packvit.corpus.inputs.lists import PIPED, STDIN
from packvit.corpus.runners.launching import Launched

EXAMPLE = "apple/aimv2-large-patch14-native"
EMBEDDED = (
    'No --model was given, so the small "tiny" model runs: 6.6 million parameters, trained on 269 '
    "photographs. For features of good quality choose a large checkpoint with --model, for "
    f"example --model {EXAMPLE}."
)
# They log tracebacks for errors of a server, which we report ourselves.
LOUD = ("asyncio", "gcsfs")
ALL = "all"  # error codes


class EmbedCommand(Command):
    """A command whose --retry-errors takes codes only: what else follows it is a photograph."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options."""
        from packvit.images.errors import CODES

        said = []
        for word, following in zip(args, [*args, ""][1:], strict=True):
            codes = following.split(",")
            alone = word == "--retry-errors" and not any(code in {ALL, *CODES} for code in codes)
            said.append(f"{word}={ALL}" if alone else word)
        return super().parse_args(ctx, said)


def split_names(
    context: click.Context, option: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names in an option, which commas separate."""
    return tuple(name for each in names for name in each.split(","))


@click.command(cls=EmbedCommand, context_settings={"show_default": True})
@click.argument("photos", nargs=-1)
@click.option(
    "--list",
    "lists",
    multiple=True,
    metavar="FILE",
    help="Also embed the paths in this file: text, one path a line, or .csv, .tsv, .jsonl or "
    ".parquet with --column; - is text from stdin. Paths are relative to the working directory. "
    "May be repeated.",
)
@click.option("--column", default="path", help="The column of paths in a --list table.")
@click.option(
    "--image-column", default="image", help="The column of image bytes in a Parquet file."
)
@click.option(
    "--keep",
    multiple=True,
    metavar="NAMES",
    callback=split_names,
    help="Also write these columns that come with the photographs, such as caption,label: of the "
    ".json, .txt and .cls beside them, of Parquet files of images, of tables of paths, "
    "and of a folder's metadata.jsonl or .csv.",
)
@click.option(
    "--out",
    required=True,
    help="The feature folder to create or to resume: a local one, or s3://, gs:// or az://.",
)
@click.option("--model", help=MODEL_HELP)
@revision_option
@device_option
@dtype_option
@click.option(
    "--attention",
    type=click.Choice(["auto", "fa4", "fa3", "fa2", "torch", "sdpa"]),
    default="auto",
    help="The attention backend.",
)
@positions_option
@click.option(
    "--invariant",
    is_flag=True,
    help="Give an image the same bits in any pack, at the price of speed; with it, --reuse and "
    "--update write the bytes of a fresh job.",
)
@resize_option
@max_patches_option
@click.option(
    "--max-pixels", type=COUNT, default=100_000_000, help="Refuse images with more pixels."
)
@click.option("--tokens", is_flag=True, help="Also write the features of every patch.")
@click.option(
    "--tap",
    "taps",
    type=int,
    multiple=True,
    metavar="LAYER",
    help="Also write the tokens leaving this layer; -1 is the last. May be repeated.",
)
@click.option(
    "--dtype-out",
    type=click.Choice(["float16", "float32"]),
    help="The dtype of all written features; by default float32 for vectors of images, and float16 "
    "for tokens and taps.",
)
@click.option(
    "--format",
    type=click.Choice(["parquet", "npy"]),
    default="parquet",
    help="npy: also write a NumPy matrix of the pooled features, and a list of the ids.",
)
@click.option("--token-budget", type=COUNT, default=16384, help="Most tokens in one pack.")
@click.option(
    "--rows-per-part",
    type=COUNT,
    help="Rows in one Parquet file, which is written once all of them are embedded; by default 64 "
    "on a CPU or with tokens, 1024 on a GPU or of a --shard (fewer in a small job), or what the "
    "folder has.",
)
@click.option(
    "--decode",
    type=click.Choice(["pil", "fast", "gpu"]),
    default="pil",
    help="What decodes JPEGs: Pillow, in the workers; fast: Pillow, those far larger than needed "
    "at 1/2 to 1/8 of their size, so that features differ a little; the GPU, if the pixels equal "
    "Pillow's bit for bit. Pillow decodes all other images.",
)
@click.option(
    "--workers",
    type=COUNT,
    help="Processes that decode images, for each process that embeds; by default one for each of "
    "its CPUs, up to 16.",
)
@click.option(
    "--image-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60,
    metavar="SECONDS",
    help="Give up on an image that takes longer to read and decode.",
)
@click.option(
    "--pixels-in-flight",
    type=COUNT,
    default=256_000_000,
    help="Most pixels being decoded or waiting at a time, for each process that embeds: lower it "
    "to use less memory, about 8 bytes a pixel.",
)
@click.option(
    "--gpus",
    "--processes",
    "processes",
    type=COUNT,
    help="Embed in this many processes, one on each GPU, or each with a share of the CPUs; the "
    "output is the same.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help='Embed on a Ray cluster: its address, "auto" for the one of this machine, or "local" to '
    "start one here.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare the encoder with its reference first, and write _certificate.json; a passing "
    "certificate beside the checkpoint is used instead.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Start over: remove the features that the folder holds, of this job or another.",
)
@click.option(
    "--retry-errors",
    "retry",
    is_flag=False,
    flag_value=ALL,
    metavar="[CODES]",
    help="Do the rows again that are errors, of all codes or of those named (timeout,unreadable); "
    "all other rows are kept.",
)
@click.option(
    "--shard",
    metavar="K/N",
    help="Do the K-th of N runs of parts, for example on one of N machines; `packvit merge` puts "
    "their folders together.",
)
@click.option(
    "--reuse",
    multiple=True,
    metavar="FOLDER",
    help="Take over the rows of this feature folder whose photographs have the same bytes, if all "
    "that decides their features is equal. May be repeated.",
)
@click.option(
    "--update",
    is_flag=True,
    help="Bring the features that --out holds up to date, by --reuse of itself: only photographs "
    "that are new or have other bytes are embedded, those that are gone are dropped. The new "
    "folder is made beside it, and swapped in whole.",
)
@click.option(
    "--reuse-across-versions",
    is_flag=True,
    help="Also take over rows that other versions of packages wrote; the manifest says so.",
)
@click.option(
    "--trust-mtime",
    is_flag=True,
    help="Record the size and time of change of every file, and do not read one whose name, size "
    "and time are those that --reuse or --update finds recorded; the manifest says so.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.pass_context
def embed(
    context: click.Context,
    photos: tuple[str, ...],
    lists: tuple[str, ...],
    out: str,
    model: str | None,
    overwrite: bool,
    retry: str | None,
    update: bool,
    as_json: bool,
    processes: int | None,
    **options: Any,  # the others, by the names that `packvit.embed` gives them
) -> None:
    """Write the features of PHOTOS to a feature folder.

    PHOTOS are folders, files, quoted patterns ('photos/**/*.jpg'), .tar, .tar.gz and .zip archives,
    .parquet files of image bytes, and URLs of any of these (s3://, gs://, hf://, https://). Paths
    in a file are given with --list.

    Every photograph becomes one row, in Parquet files. A photograph that cannot be read becomes a
    row with the error; the exit code is then 3. A job that was stopped for any reason resumes when
    the same command is run again.

    \b
    Examples:
      packvit embed photos --out features
      packvit embed photos --out features --model apple/aimv2-large-patch14-native
      packvit embed a.jpg b.png --out features --tokens --tap 11 --json
      packvit embed photos --out features --device cuda --decode gpu
      packvit embed 'shards/*.tar' s3://bucket/photos --out features
      packvit embed --list photos.csv --column file --keep caption --out features
      find photos -name '*.jpg' | packvit embed --list - --out features
    """
    lists += tuple(STDIN for name in photos if name in PIPED)  # a list, as nothing else can be
    photos = tuple(name for name in photos if name not in PIPED)
    if not photos and not lists:
        raise click.UsageError("Missing argument 'PHOTOS...', or --list with a file of paths.")
    for name in LOUD:
        logging.getLogger(name).addHandler(logging.NullHandler())
    with (
        stopping(context, out, overwrite, update) as meter,
        launch(processes, options) as started,
        redirect_stdout(sys.stderr),
        explaining(model),
    ):
        if model is None:
            meter.notices.append(EMBEDDED)  # once the job begins: an error comes first
        # torch is imported here, where Ctrl-C is handled.
        from packvit.corpus.job import embed as run

        summary = run(
            photos,
            lists=lists,
            out=out,
            model=model and full_name(model),
            overwrite=overwrite,
            update=update,
            retry_errors=retry is not None if retry in (None, ALL) else retry.split(","),
            progress=meter.tell,
            processes=started,
            **options,
        )
    click.echo(json.dumps(as_object(summary)) if as_json else as_table(summary))
    context.exit(DONE_WITH_ERRORS if summary.errors else 0)


def launch(
    processes: int | None, options: Mapping[str, Any]
) -> AbstractContextManager[Launched | int | None]:
    """Start the processes that embed on this host, which import torch while this one does."""
    if processes is None or processes < 2 or options["ray"] is not None:
        return nullcontext(processes)
    if options["decode"] == "gpu":
        from packvit.gpu.nvjpeg import ask_for_queues  # imports numpy

        ask_for_queues()  # which they inherit
    return Launched(processes)


@contextmanager
def stopping(context: click.Context, out: str, overwrite: bool, update: bool) -> Iterator[Meter]:
    """Show the job's progress; on Ctrl-C or SIGTERM print what was written, and exit."""
    meter = None
    try:
        with show_progress() as meter:
            yield meter
    except KeyboardInterrupt as stop:
        click.echo(what_is_written(meter, out, overwrite, update), err=True)
        context.exit(exit_code(stop))


def what_is_written(meter: Meter | None, out: str, overwrite: bool, update: bool) -> str:
    """Return a message on what a stopped job has written, and how to resume it."""
    if meter is None or meter.last is None:
        return "Stopped before anything was written. Run the same command again."
    from packvit.corpus.folder.swapping import new_of

    if update and new_of(Path(out).resolve()).exists():
        return f"Stopped: {out} is as it was. The same command resumes the update."
    # These import pyarrow, which would slow down `--help`.
    from packvit.corpus.folder.layout import read_commits
    from packvit.corpus.folder.stores import find_folder

    written = sum(entry.rows for entry in read_commits(find_folder(out)))
    return (
        f"Stopped: {written:,} of {meter.last.rows:,} rows are written to {out}. "
        f"The same command{' without --overwrite' if overwrite else ''} resumes from there."
    )
