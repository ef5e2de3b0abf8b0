"""The options that several commands have, each with its one help text. No torch."""

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

COUNT = click.IntRange(min=1)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option("--device", help="cpu, cuda, cuda:1 ...; a GPU if there is one.")
width_option = click.option(
    "--width", type=click.IntRange(600, 1600), default=1600, help="Pixels across the picture."
)


def model_option(where: str = "Where") -> Decorator:
    """Return the option that says where a feature folder's model is."""
    return click.option("--model", help=f"{where} the folder's model is now, if it was moved.")


def template_option(words: str = "Words") -> Decorator:
    """Return the option of the words around a label."""
    return click.option(
        "--template",
        "templates",
        multiple=True,
        show_default=False,
        help=f'{words} around a label, "a photo of a {{}}."; may be repeated. Seven of CLIP\'s if '
        "none.",
    )
