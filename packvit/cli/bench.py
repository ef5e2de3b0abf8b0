"""`packvit bench`: our encoder against its peers and the machine's limits."""

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
    """Compare the speed of our encoder with transformers, timm and a large matmul.

    All run in one process on the same weights and images, in turns, in shuffled order. A contender
    is timed only if its tokens equal the reference's. What cannot run on this machine is listed
    with the reason. The exit code is 1 if one of our contenders computes wrong tokens.

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
