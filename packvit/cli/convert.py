"""`packvit convert`: rewrite a checkpoint in another layout, bit for bit."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from packvit.cli.command import Command
from packvit.cli.models import explaining, full_name
from packvit.cli.options import json_option, revision_option
from packvit.corpus.inputs.addresses import check_local


@click.command(cls=Command)
@click.argument("name")
@click.argument("folder")
@click.option(
    "--layout",
    required=True,
    type=click.Choice(["transformers", "original"]),
    help="How the new checkpoint names and shapes its tensors.",
)
@revision_option
@json_option
def convert(
    name: str,
    folder: str,
    layout: Any,  # click has checked the words
    revision: str | None,
    as_json: bool,
) -> None:
    """Write the checkpoint NAME, on the hub or in a folder, to the new FOLDER in another layout.

    Values and dtypes are unchanged. A text tower is not written, which is reported. `packvit info`
    lists the layouts of each family.

    \b
    Examples:
      packvit convert apple/aimv2-large-patch14-native native --layout transformers
      packvit convert ./checkpoint ./original --layout original --json
    """
    from packvit import hub  # torch is imported here

    try:
        check_local(folder, name="FOLDER")
        with explaining(name):
            made = hub.convert(full_name(name), folder, layout, revision=revision)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if made.skipped:
        click.echo(f"skipped: {count(made.skipped)} of {parts(made.skipped)}", err=True)
    written = f"{made.tensors:,} tensors, {made.bytes:,} bytes, in layout {layout}: {made.folder}"
    click.echo(json.dumps(asdict(made)) if as_json else written)


def count(names: Sequence[str]) -> str:
    """Return the number of tensors in words."""
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def parts(names: Sequence[str]) -> str:
    """Return the parts of a model that tensors belong to: the first words of their names."""
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
