"""`packvit merge`: the shards of one job, made apart, to one feature folder."""

import json
import time
from dataclasses import asdict

import click

from packvit.cli import DONE_WITH_ERRORS
from packvit.cli.command import Command
from packvit.cli.progress import PAUSE


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("folders", nargs=-1, required=True)
@click.option("--out", required=True, help="The feature folder to create.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parquet", "npy"]),
    default="parquet",
    help="npy: also write a NumPy matrix of the pooled features, and a list of the ids.",
)
@click.option("--overwrite", is_flag=True, help="Remove the features that --out holds first.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.pass_context
def merge(
    context: click.Context,
    folders: tuple[str, ...],
    out: str,
    format_: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Put the FOLDERS of all shards of a job together.

    They are what `packvit embed --shard` wrote, in any order. The sha256 of every part is verified,
    and the result is byte for byte that of one job. Shards of other inputs, settings, versions of
    packages or models of GPU are refused, and so is one that is missing, given twice or half done.
    A merge that was stopped resumes when the same command is run again. The exit code is 3 if some
    inputs are errors.

    \b
    Examples:
      packvit merge shard-1 shard-2 shard-3 --out features
      packvit merge shards/* --out features --format npy
    """
    from packvit.corpus.folder.merging import merge as run  # brings pyarrow

    due = time.monotonic() + PAUSE

    def tell(done: int, rows: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + PAUSE
            click.echo(f"{done:,} of {rows:,} rows are written", err=True)

    merged = run(
        folders,
        out=out,
        format="npy" if format_ == "npy" else "parquet",
        overwrite=overwrite,
        progress=tell,
    )
    bad = merged.rows - merged.ok
    if as_json:
        click.echo(json.dumps(asdict(merged)))
    else:
        shards = f"{merged.shards:,} shard{'' if merged.shards == 1 else 's'}"
        click.echo(
            f"{merged.folder}: {shards}, {merged.parts:,} parts with {merged.rows:,} rows, {bad:,} "
            "of them errors"
        )
    context.exit(DONE_WITH_ERRORS if bad else 0)
