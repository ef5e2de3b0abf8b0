"""The options that several commands have, each with its one help text. No torch."""

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

COUNT = click.IntRange(min=1)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option("--device", help="cpu, cuda, cuda:1 ...; a GPU if there is one.")
revision_option = click.option(
    "--revision", help="A commit, branch or tag of the checkpoint on the hub."
)
root_option = click.option("--root", help="Where the photographs are now, if they were moved.")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in; bfloat16 on a GPU, float32 elsewhere.",
)
positions_option = click.option(
    "--positions",
    type=click.Choice(["checkpoint", "interpolate"]),
    default="checkpoint",
    help="Whether learned positions are resized for grids that they were not made for.",
)
resize_option = click.option(
    "--resize",
    type=click.Choice(["checkpoint", "native"]),
    help="As the checkpoint's own preprocessing, or keeping size and aspect ratio; "
    "checkpoint where it defines a size.",
)
max_patches_option = click.option(
    "--max-patches", type=COUNT, help="Shrink images to at most this many patches."
)
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
