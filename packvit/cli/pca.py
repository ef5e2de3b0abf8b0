"""`packvit pca`: pictures of the features of photographs."""

from typing import Any

import click

from packvit.cli import DONE_WITH_ERRORS
from packvit.cli.command import Command, printable
from packvit.cli.models import MODEL_HELP, explaining, full_name
from packvit.cli.options import (
    COUNT,
    device_option,
    max_patches_option,
    positions_option,
    resize_option,
    revision_option,
    width_option,
)
from packvit.cli.progress import show_progress
from packvit.images.errors import CODES


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("photos", nargs=-1, required=True)
@click.option("--out", required=True, help="The picture to write: .png, .jpg or .webp.")
@click.option("--model", help=MODEL_HELP)
@revision_option
@device_option
@positions_option
@resize_option
@max_patches_option
@click.option("--layer", type=int, help="Draw the tokens leaving this layer; -1 is the last.")
@click.option("--per-image", is_flag=True, help="Give every photograph a PCA of its own.")
@click.option(
    "--background",
    type=click.Choice(["keep", "remove"]),
    default="keep",
    help="Whether to leave out the side of the first component that holds most border patches.",
)
@click.option("--overlay", is_flag=True, help="Draw the colours over the photograph.")
@click.option(
    "--similar-to",
    metavar="PHOTO:ROW,COLUMN",
    help="Draw the cosine of this patch of one of PHOTOS to every patch, instead of a PCA.",
)
@click.option(
    "--neighbours",
    metavar="FOLDER",
    help="Draw each photograph's nearest neighbours in this feature folder, instead of a PCA.",
)
@click.option("--root", default=".", help="The folder that the feature folder's paths start from.")
@click.option("--count", type=COUNT, default=6, help="How many neighbours.")
@width_option
@click.pass_context
def pca(
    context: click.Context,
    photos: tuple[str, ...],
    out: str,
    model: str | None,
    revision: str | None,
    device: str | None,
    positions: Any,  # click has checked the words of these three
    resize: Any,
    max_patches: int | None,
    layer: int | None,
    per_image: bool,
    background: Any,
    overlay: bool,
    similar_to: str | None,
    neighbours: str | None,
    root: str,
    count: int,
    width: int,
) -> None:
    """Draw the features of PHOTOS, folders and files, as one picture.

    Every patch is coloured by the first three components of one PCA over all photographs, so that
    equal colours mean similar features; signs and scale are fixed. A photograph that cannot be read
    is named on stderr and left out; the exit code is then 3.

    \b
    Examples:
      packvit pca photos --out pca.png
      packvit pca cat.jpg dog.jpg --out pca.png --background remove --layer -2
      packvit pca cat.jpg dog.jpg --out like.png --similar-to cat.jpg:12,20
      packvit pca cat.jpg --out near.png --neighbours features --root photos
    """
    with show_progress() as meter, explaining(model):
        if model is None and neighbours is None:
            meter.notices.append('No --model was given, so the small "tiny" model runs.')
        # torch is imported here, where Ctrl-C is handled.
        from packvit.pictures.draw import draw

        drawn = draw(
            photos,
            out=out,
            model=model and full_name(model),
            revision=revision,
            device=device,
            positions=positions,
            resize=resize,
            max_patches=max_patches,
            layer=layer,
            per_image=per_image,
            background=background,
            overlay=overlay,
            similar_to=similar_to,
            neighbours=neighbours,
            root=root,
            count=count,
            width=width,
            progress=meter.tell,
        )
    for row in drawn.errors:
        why = CODES[row.status] + (f" ({row.note})" if row.note else "")
        click.echo(f"{printable(row.id)}: {row.status}: {why}", err=True)
    if drawn.lost:
        click.echo(
            f"{len(drawn.lost)} of the neighbours, for example {printable(drawn.lost[0])}, cannot "
            f"be read under {root} and are left blank. Name their folder with --root.",
            err=True,
        )
    if not drawn.photographs:
        raise click.ClickException(
            f"None of the {len(drawn.errors)} photographs can be drawn; {out} was not written."
        )
    plural = "" if drawn.photographs == 1 else "s"
    width, height = drawn.size
    click.echo(f"{out}: {drawn.photographs} photograph{plural}, {width} x {height} pixels")
    context.exit(DONE_WITH_ERRORS if drawn.errors else 0)
