"""`packvit bench`: our figures beside our peers' and the machine's own limits."""

import json
from pathlib import Path

import click

from packvit.bench import DTYPES, MODELS, WORKLOADS, BenchError, BenchOptions
from packvit.bench.table import as_markdown

WRONG = 1


@click.command(context_settings={"show_default": True})
@click.option(
    "--model",
    default="aimv2-large",
    help=f"{', '.join(MODELS)} (random weights), tiny, a checkpoint's name on the hub, or its "
    "folder.",
)
@click.option(
    "--workload",
    type=click.Choice([*WORKLOADS, "all"]),
    default="mixed",
    help="Which pack; on a CPU all are scaled down.",
)
@click.option("--train", is_flag=True, help="Forward and backward, instead of forward alone.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="What to compute in; bfloat16 on a GPU, float32 elsewhere.",
)
@click.option("--device", help="cpu, cuda, cuda:1 ...; a GPU if there is one.")
@click.option(
    "--rounds",
    type=click.IntRange(min=2),
    default=11,
    help="How often each contender's turn comes.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Cut a model of random weights to so many layers; on a CPU to 2, unless told.",
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    help="cpu: the time that all threads were at work, for a CPU shared with other programs.",
)
@click.option(
    "--compiled/--no-compiled",
    default=None,
    help="Whether contenders take part that torch.compile prepares, which takes minutes; on a GPU "
    "they do.",
)
@click.option(
    "--json",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write the report there too; - prints it instead of the table.",
)
@click.pass_context
def bench(
    context: click.Context,
    model: str,
    workload: str,
    train: bool,
    dtype: str | None,
    device: str | None,
    rounds: int,
    layers: int | None,
    clock: str,
    compiled: bool | None,
    target: Path | None,
) -> None:
    """Time our encoder beside transformers and timm, and beside a large matmul.

    All run in one process on the same weights and images, in turns, in shuffled order, and only
    if their tokens agree. What cannot run on this machine is listed with its reason. The exit code
    is 1 if a contender of ours computes something else.

    \b
    Examples:
      packvit bench
      packvit bench --model siglip2-so400m --workload all --json so400m.json
      packvit bench --model tiny --workload small --rounds 3
    """
    chosen = tuple(WORKLOADS) if workload == "all" else (workload,)
    if target is not None and str(target) != "-" and not target.parent.is_dir():
        raise click.UsageError(f"{target.parent} is not a folder. Choose another file for --json.")
    options = BenchOptions(model, chosen, train, rounds, device, dtype, layers, clock, compiled)
    from packvit.bench.run import measure  # torch is imported here
    from packvit.checkpoints.files import CheckpointError

    try:
        report = measure(options, lambda words: click.echo(words, err=True))
    except BenchError as error:
        raise click.UsageError(str(error)) from error
    except (CheckpointError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    written = json.dumps(report, indent=1)
    click.echo(written if str(target) == "-" else as_markdown(report))
    if target is not None and str(target) != "-":
        try:
            target.write_text(written + "\n")
        except OSError as error:
            reason = f"{target} could not be written: {error.strerror}. Name another file."
            raise click.ClickException(reason) from error
        click.echo(f"The report is {target}.", err=True)
    ours_wrong = any(
        title.startswith("packvit") for work in report["workloads"] for title in work["wrong"]
    )
    context.exit(WRONG if ours_wrong else 0)
