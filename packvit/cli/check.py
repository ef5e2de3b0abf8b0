"""`packvit check`: whether a feature folder is whole."""

import json
from dataclasses import asdict

import click

from packvit.cli.command import Command
from packvit.cli.options import json_option
from packvit.corpus import WriteError


@click.command(cls=Command)
@click.argument("folder")
@json_option
@click.pass_context
def check(context: click.Context, folder: str, as_json: bool) -> None:
    """Read all of a feature FOLDER; print what is wrong with it and how to repair it.

    This checks the manifest, the log, the size and sha256 of every part, the checksum of every
    page, columns, counts, that there is one row for every input in order, and that features are
    finite. The exit code is 0 if nothing is wrong, 1 if something is, and 2 if FOLDER is not a
    feature folder.

    \b
    Examples:
      packvit check features
      packvit check features --json | jq .faults
    """
    from packvit.corpus.folder.checking import check_folder  # brings pyarrow
    from packvit.corpus.folder.stores import find_folder

    try:
        found = check_folder(find_folder(folder, name="FOLDER"))
    except WriteError:
        raise
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be read: {error.strerror}.") from error
    if as_json:
        click.echo(json.dumps({"whole": not found.faults, **asdict(found)}))
    else:
        bad = sum(found.errors.values())
        for fault in found.faults:
            click.echo(f"{fault.file} {fault.found}\n  {fault.mend}")
        faults = f"{len(found.faults)} fault{'' if len(found.faults) == 1 else 's'}"
        click.echo(
            f"{found.folder}: {found.parts:,} whole part{'' if found.parts == 1 else 's'} with "
            f"{found.rows:,} row{'' if found.rows == 1 else 's'}, {bad:,} of them errors, and "
            f"{found.tokens:,} tokens; {faults if found.faults else 'all is well'}"
        )
    context.exit(1 if found.faults else 0)
