"""`packvit zeroshot`: labels without training."""

import json

import click

from packvit.cli.command import Command, printable
from packvit.cli.models import explaining, full_name
from packvit.cli.options import device_option, json_option, model_option, template_option


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("folder")
@click.option("--labels", required=True, help='"a cat,a dog", or a file with one label a line.')
@click.option("--out", required=True, help="The table to write: .parquet or .csv.")
@template_option()
@json_option
@model_option()
@device_option
def zeroshot(
    folder: str,
    labels: str,
    out: str,
    templates: tuple[str, ...],
    as_json: bool,
    model: str | None,
    device: str | None,
) -> None:
    """Give every photograph of a feature FOLDER the label whose words it is nearest to.

    The folder is not changed: a table is written, with a row for each of the folder's, the best
    label, its score and its cosine, and in Parquet the scores of all labels. Scores are the
    model's own: CLIP's sum to 1 over the labels, SigLIP judges each label by itself.

    \b
    Examples:
      packvit zeroshot features --labels "cat,dog,bicycle" --out labels.csv
      packvit zeroshot features --labels names.txt --template "a {}." --out labels.parquet
    """
    with explaining(model):
        # torch is imported here, where Ctrl-C is handled.
        from packvit.retrieval import zeroshot as scoring

        found = scoring.zeroshot(
            folder,
            scoring.read_labels(labels),
            out=out,
            templates=templates or scoring.TEMPLATES,
            model=model and full_name(model),
            device=device,
        )
    if as_json:
        facts = {"out": str(found.out), "rows": found.rows, "errors": found.errors}
        click.echo(json.dumps(facts | {"labels": found.counts}))
        return
    for label, count in sorted(found.counts.items(), key=lambda item: -item[1]):
        click.echo(f"{count:>9,}  {printable(label)}")
    without = f", {found.errors:,} of them without a label" if found.errors else ""
    click.echo(f"{found.out}: {found.rows:,} rows{without}", err=True)
