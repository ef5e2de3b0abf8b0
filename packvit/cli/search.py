"""`packvit search`: photographs by words, by a photograph, by sums of both."""

import json
import os

import click

from packvit.cli.command import Command, printable
from packvit.cli.models import explaining, full_name
from packvit.cli.options import (
    COUNT,
    device_option,
    json_option,
    model_option,
    root_option,
    width_option,
)
from packvit.corpus.folder.names import CURRENT, FIRST
from packvit.corpus.folder.requests import STORES
from packvit.corpus.folder.stores import find_folder
from packvit.corpus.inputs.addresses import is_url


class SearchCommand(Command):
    """A command whose arguments may begin with a minus and a space."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Part "- words" into its sign and the words, which click takes for arguments."""
        parted = [each for arg in args for each in part(arg)]
        return super().parse_args(ctx, parted)


def part(arg: str) -> tuple[str, ...]:
    """Return a sign and what it stands before, or an argument as it is."""
    return ("-", arg[2:].strip()) if arg.startswith("- ") and arg[2:].strip() else (arg,)


@click.command(cls=SearchCommand, context_settings={"show_default": True})
@click.argument("folder")
@click.argument("queries", nargs=-1, required=True, metavar="[FOLDER...] QUERY...")
@click.option("-t", "--top", type=COUNT, default=10, help="How many photographs for each query.")
@click.option("-f", "--paths", "only_paths", is_flag=True, help="Print only paths, for pipes.")
@json_option
@click.option("--out", help="Also draw a contact sheet: .png, .jpg or .webp.")
@root_option
@model_option()
@device_option
@click.option(
    "--index",
    is_flag=True,
    help="Use an approximate index beside the parts; it is built once, and its recall printed.",
)
@width_option
def search(
    folder: str,
    queries: tuple[str, ...],
    top: int,
    only_paths: bool,
    as_json: bool,
    out: str | None,
    root: str | None,
    model: str | None,
    device: str | None,
    index: bool,
    width: int,
) -> None:
    """Find the photographs of a feature FOLDER that are nearest to each QUERY.

    A QUERY is words, or the path of a photograph. "+ words" and "- words" are added to the query
    before them and taken from it; "2:words" counts twice. Nearest means the largest cosine, over
    all rows, exactly. Further feature folders before the first QUERY are searched as well. Words
    need a model with a text tower, such as CLIP or SigLIP.

    \b
    Examples:
      packvit search features "red bicycle"
      packvit search features beach.jpg --out like.jpg
      packvit search features "2:red bicycle" "+ beach.jpg" "- night" -t 20
      packvit search features "red bicycle" -f | xargs -d '\\n' cp -t chosen
    """
    if only_paths and as_json:
        raise click.UsageError("-f and --json exclude each other. Leave one of the two out.")
    folders, asked = [folder], list(queries)
    while asked and is_feature_folder(asked[0]):
        folders.append(asked.pop(0))
    if not asked:
        raise click.UsageError("No query was given. Give words, or the path of a photograph.")
    with explaining(model):
        # torch is imported here, where Ctrl-C is handled.
        from packvit.pictures.contact import check_picture, write_hits
        from packvit.retrieval.queries import BrokenQuery
        from packvit.retrieval.search import find

        try:
            if out:
                check_picture(out, asked)
            found = find(
                folders,
                asked,
                top,
                model=model and full_name(model),
                device=device,
                root=root,
                index=index,
            )
            lost = write_hits(found, out, width=width) if out else []
        except BrokenQuery as error:
            raise click.ClickException(str(error)) from error
    for note in found.notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    for query, hits in zip(found.queries, found.hits, strict=True):
        if only_paths:
            for hit in hits:
                click.echo(os.fsencode(hit.path))
        elif not as_json:
            if len(found.queries) > 1:
                click.echo(f"{printable(query.typed)}:")
            for hit in hits:
                click.echo(f"{hit.score:.4f}  {printable(hit.path)}")
    if lost:
        click.echo(
            f"{len(lost)} of the photographs, for example {printable(lost[0])}, cannot be read and "
            "are left blank. Name their folder with --root.",
            err=True,
        )


def is_feature_folder(path: str) -> bool:
    """Return whether a path is a folder with a manifest of features."""
    if is_url(path) and path.partition("://")[0] in STORES:
        return (find_folder(path, name="FOLDER") / CURRENT.manifest).is_file()
    return any(os.path.isfile(os.path.join(path, names.manifest)) for names in (CURRENT, FIRST))
