"""`packvit dups`: groups of equal and of nearly equal photographs."""

import json
import os
import time
from typing import Any

import click

from packvit.cli.command import Command, printable
from packvit.cli.options import device_option, json_option, root_option, width_option

PAUSE = 5.0  # seconds between lines of progress
SAID = {"first": "", "bytes": "equal bytes", "pixels": "equal pixels"}


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("folder")
@click.option(
    "--threshold",
    type=float,
    default=0.95,
    help="The least cosine of photographs that are nearly equal; 1 finds only copies.",
)
@click.option(
    "--keep",
    type=click.Choice(["largest", "first"]),
    help="Print the paths of all but one of each group, which may be deleted; nothing is deleted.",
)
@json_option
@click.option("--out", help="Also draw a contact sheet of the groups: .png, .jpg or .webp.")
@root_option
@click.option(
    "--pixels/--no-pixels",
    default=True,
    help="Whether to decode photographs of a group, to tell equal pixels from nearly equal ones.",
)
@device_option
@width_option
def dups(
    folder: str,
    threshold: float,
    keep: Any,  # click has checked the word
    as_json: bool,
    out: str | None,
    root: str | None,
    pixels: bool,
    device: str | None,
    width: int,
) -> None:
    """Find groups of photographs in a feature FOLDER that are equal, or nearly.

    Every two photographs of a group are alike: a chain, of which only neighbours are alike, is not
    one group. The largest comes first, and the others with how they are like it: equal bytes,
    equal pixels, or the cosine. Nothing is deleted.

    \b
    Examples:
      packvit dups features
      packvit dups features --threshold 0.9 --out groups.jpg
      packvit dups features --keep largest > may-go.txt
    """
    # torch is imported here, where Ctrl-C is handled.
    from packvit.pictures.contact import check_picture, write_groups
    from packvit.retrieval.duplicates import find_duplicates

    if out:
        check_picture(out, ())
    found = find_duplicates(
        folder,
        threshold=threshold,
        keep=keep or "largest",
        root=root,
        pixels=pixels,
        device=device,
        tell=Slowly(),
    )
    lost = write_groups(found, out, width=width) if out else []
    may_go = found.redundant
    if as_json:
        click.echo(json.dumps(found.as_json()))
    elif keep:
        for member in may_go:
            click.echo(os.fsencode(member.path))
    else:
        for number, group in enumerate(found.groups, 1):
            click.echo(f"group {number}: {len(group)} photographs")
            for member in group:
                size = f"{member.width} x {member.height}" if member.width else "no image"
                said = SAID.get(member.match, f"{member.score:.4f}")
                click.echo(f"  {said:>12}  {size:>11}  {printable(member.path)}")
    plural = "" if len(found.groups) == 1 else "s"
    click.echo(
        f"{len(found.groups):,} group{plural} in {found.rows:,} photographs; "
        f"{len(may_go):,} may go",
        err=True,
    )
    if found.unread:
        click.echo(
            f"{found.unread:,} photographs could not be read, so that their pixels were not "
            "compared. Name their folder with --root.",
            err=True,
        )
    elif lost:
        click.echo(
            f"{len(lost)} photographs cannot be read and are left blank. Name their folder with "
            "--root.",
            err=True,
        )


class Slowly:
    """Says how far the comparison is, every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, done: int, rows: int) -> None:
        """Print a line, unless one was printed just now."""
        if time.monotonic() - self.last >= PAUSE:
            self.last = time.monotonic()
            share = 1 - (1 - done / rows) ** 2  # each row is compared with those after it
            click.echo(f"{share:.0%} of all pairs compared", err=True)
