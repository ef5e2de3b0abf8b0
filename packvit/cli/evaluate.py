"""`packvit evaluate knn|zeroshot`: the numbers that papers print."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from packvit.cli.command import Command
from packvit.cli.models import explaining, full_name
from packvit.cli.options import COUNT, device_option, json_option, model_option, template_option

if TYPE_CHECKING:
    from packvit.retrieval.evaluation import Accuracy


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("protocol", type=click.Choice(["knn", "zeroshot"]))
@click.argument("folder")
@click.option(
    "--train", help="knn: the feature folder of the neighbours; by default all other rows."
)
@click.option("--label", help="The column of the labels; by default a row's first folder.")
@click.option("--labels", help="A Parquet file with the columns id and label, or --label.")
@click.option("--neighbours", type=COUNT, default=20, help="knn: how many vote.")
@click.option(
    "--temperature", type=float, default=0.07, help="knn: the temperature of the votes' weights."
)
@template_option("zeroshot: words")
@json_option
@model_option("zeroshot: where")
@device_option
def evaluate(
    protocol: str,
    folder: str,
    train: str | None,
    label: str | None,
    labels: str | None,
    neighbours: int,
    temperature: float,
    templates: tuple[str, ...],
    as_json: bool,
    model: str | None,
    device: str | None,
) -> None:
    """Print the accuracy of a model on the labelled photographs of a feature FOLDER.

    knn is DINOv2's protocol: the 20 nearest by cosine vote, weighted by exp(cosine / 0.07).
    zeroshot takes the label whose words are nearest. A photograph's label is the first sub-folder
    that it lies in. What the model's authors publish for ImageNet-1k is printed beside it.

    \b
    Examples:
      packvit evaluate knn val-features --train train-features
      packvit evaluate knn features
      packvit evaluate zeroshot features --labels labels.parquet
    """
    with explaining(model):
        # torch is imported here, where Ctrl-C is handled.
        from packvit.retrieval.evaluation import evaluate_knn, evaluate_zeroshot
        from packvit.retrieval.zeroshot import TEMPLATES

        if protocol == "knn":
            found = evaluate_knn(
                folder,
                train=train,
                label=label,
                labels=labels,
                neighbours=neighbours,
                temperature=temperature,
                device=device,
            )
        else:
            found = evaluate_zeroshot(
                folder,
                label=label,
                labels=labels,
                templates=templates or TEMPLATES,
                model=model and full_name(model),
                device=device,
            )
    if as_json:
        click.echo(json.dumps({"protocol": protocol} | asdict(found)))
    else:
        click.echo("\n".join(lines(protocol, found)))


def lines(protocol: str, found: "Accuracy") -> list[str]:
    """Return what is printed of an accuracy."""
    said = [
        f"{protocol} of {found.model}: {found.rows:,} photographs, {found.classes:,} labels",
        f"top-1  {found.top1:.1%}",
        f"top-5  {found.top5:.1%}",
    ]
    if found.published is not None:
        said.append(f"published top-1 of this model on ImageNet-1k  {found.published:.1f}%")
    if found.left_out:
        said.append(f"{found.left_out:,} rows without features or a label were left out")
    return said
