"""`packvit bench`: our encoder against its peers and the machine's limits."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from packvit.bench import MODELS, NATIVE, NATIVE_WORKLOAD, WORKLOADS, BenchOptions
from packvit.bench.table import as_markdown
from packvit.cli.command import Command
from packvit.cli.models import explaining
from packvit.cli.options import device_option, dtype_option

WRONG = 1
ALL = "all"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--model",
    "models",
    multiple=True,
    help=f"{', '.join(MODELS)} (random weights), tiny, a checkpoint's name on the hub, or its "
    "folder; aimv2-large by default. With --workload native, which of its batches: "
    f"{', '.join(NATIVE)}; all by default. May be repeated.",
)
@click.option(
    "--workload",
    type=click.Choice([*WORKLOADS, ALL, NATIVE_WORKLOAD]),
    default="mixed",
    help="Which pack; on a CPU all are scaled down. native: batches of the checkpoints' own size.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="How long a model may take, with --workload native all: what time does not suffice for is "
    "left out, from the end.",
)
@click.option(
    "--autotuned/--no-autotuned",
    default=True,
    help="With --workload native, whether peers are compiled by max-autotune too, where that takes "
    "no more than two minutes.",
)
@click.option(
    "--way",
    "ways",
    multiple=True,
    metavar="TITLE",
    help="A contender to be timed beside the baseline, as the table calls it; all by default. May "
    "be repeated.",
)
@click.option(
    "--commit",
    help="What commit this is, for the report, where git cannot tell.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the report of each model, or native batch, is written as soon as it is done.",
)
@click.option("--train", is_flag=True, help="Forward and backward, instead of forward alone.")
@dtype_option
@device_option
@click.option(
    "--rounds",
    type=click.IntRange(min=2),
    default=11,
    help="How many times each contender runs.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Number of layers of a model with random weights; on a CPU 2 by default.",
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    help="cpu: the CPU time of all threads, for a machine shared with other programs.",
)
@click.option(
    "--compiled/--no-compiled",
    default=None,
    help="Whether to include contenders that use torch.compile, which takes minutes; by default "
    "on a GPU only.",
)
@click.option(
    "--json",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Also write the report to this file; - prints it instead of the table.",
)
@click.pass_context
def bench(
    context: click.Context,
    models: tuple[str, ...],
    workload: str,
    seconds: float | None,
    autotuned: bool,
    ways: tuple[str, ...],
    commit: str | None,
    out: Path | None,
    train: bool,
    dtype: str | None,
    device: str | None,
    rounds: int,
    layers: int | None,
    clock: str,
    compiled: bool | None,
    target: Path | None,
) -> None:
    """Compare the speed of our encoder with transformers, timm and a large matmul.

    All run in one process on the same weights and images, in turns, in shuffled order. A contender
    is timed only if its tokens equal the reference's. What cannot run on this machine is listed
    with the reason. The exit code is 1 if one of our contenders computes wrong tokens.

    \b
    Examples:
      packvit bench
      packvit bench --model siglip2-so400m --workload all --json so400m.json
      packvit bench --model tiny --workload small --rounds 3
      packvit bench --workload native --model clip-l14-224 --seconds 300 --out rows
    """
    if target is not None and str(target) != "-" and not target.parent.is_dir():
        raise click.UsageError(f"{target.parent} is not a folder. Choose another file for --json.")
    options = BenchOptions(
        train=train,
        rounds=rounds,
        device=device,
        dtype=dtype,
        layers=layers,
        clock=clock,
        compiled=compiled,
        commit=commit,
    )
    if workload == NATIVE_WORKLOAD:
        if target is not None:
            raise click.UsageError("--workload native writes many reports: name a folder by --out.")
        off = False
        names = models or tuple(NATIVE)
        for report in native_reports(options, names, seconds, autotuned, ways, out):
            off = ours_wrong(report) or off
        context.exit(WRONG if off else 0)
    if len(models) > 1 and target is not None:
        raise click.UsageError("Several models make many reports: name a folder by --out.")
    if out is not None and len({Path(model).name for model in models}) < len(models):
        raise click.UsageError(
            "Two models have one name, and the second report would replace the first. Measure "
            "them apart, each with its own --out."
        )
    chosen = tuple(WORKLOADS) if workload == ALL else (workload,)
    asked = replace(options, workloads=chosen)
    off = False
    for report in pack_reports(asked, models or (options.model,), seconds, ways, out):
        written = json.dumps(report, indent=1)
        click.echo(written if str(target) == "-" else as_markdown(report))
        if target is not None and str(target) != "-":
            write(target, written)
            remark(f"The report is {target}.")
        off = ours_wrong(report) or off
    context.exit(WRONG if off else 0)


def pack_reports(
    options: BenchOptions,
    models: Sequence[str],
    seconds: float | None,
    ways: Sequence[str],
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """Measure one model after the other on packs; write each to `out` as soon as it is done."""
    from packvit.bench.run import measure  # torch is imported here

    make_folder(out)
    for model in models:
        with explaining(model):
            report = measure(replace(options, model=model), remark, seconds=seconds, ways=ways)
        if out is not None:
            put(out, f"bench-{Path(model).name}", report)
        yield report


def native_reports(
    options: BenchOptions,
    names: Sequence[str],
    seconds: float | None,
    autotuned: bool,
    ways: Sequence[str],
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """Measure one batch after the other; print and write each as soon as it is done."""
    from packvit.bench.native import measure_native  # torch is imported here

    make_folder(out)
    for report in measure_native(
        options, names, remark, seconds=seconds, autotuned=autotuned, ways=ways
    ):
        click.echo(as_markdown(report))
        if out is not None:
            put(out, report["row"], report)
        yield report


def make_folder(out: Path | None) -> None:
    """Make the folder of reports. Raises: click.UsageError if it cannot be one."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{out} cannot be a folder: {error.strerror}. Name another by --out."
        raise click.UsageError(reason) from error


def put(out: Path, name: str, report: dict[str, Any]) -> None:
    """Write a report to a folder, under a name that says the kind of machine."""
    target = out / f"{name}-{place(report)}.json"
    write(target, json.dumps(report, indent=1))
    remark(f"The report is {target}.")


def remark(words: str) -> None:
    """Say what is going on."""
    click.echo(words, err=True)


def place(report: dict[str, Any]) -> str:
    """Return the machine's kind as a part of a file's name: h100, h200, cpu."""
    if report["device"] != "cuda":
        return "cpu"
    words = report["gpus"].partition(",")[0].lower().split()
    return next((word for word in words if any(letter.isdigit() for letter in word)), words[-1])


def write(target: Path, words: str) -> None:
    """Write a report."""
    try:
        target.write_text(words + "\n")
    except OSError as error:
        reason = f"{target} could not be written: {error.strerror}. Name another file."
        raise click.ClickException(reason) from error


def ours_wrong(report: dict[str, Any]) -> bool:
    """Return whether a contender of ours computes something else."""
    return any(
        title.startswith("packvit") for work in report["workloads"] for title in work["wrong"]
    )
