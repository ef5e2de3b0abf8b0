"""`packvit verify --published`: certificates of published checkpoints, and their table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from packvit.verification import VerifyOptions

MISSED, UNREAD = 1, 3


def run_published(
    names: Sequence[str],
    folder: Path,
    options: VerifyOptions,
    device: str | None,
    *,
    as_json: bool,
) -> int:
    """Verify the checkpoints named, or all, print the table and return the exit code.

    Raises: click.ClickException.
    """
    from packvit.verification.published import Verified, published_names, verify_published

    names, found = names or published_names(), list[Verified]()
    try:
        for one in verify_published(names, folder, options, device):
            found.append(one)
            click.echo(f"{len(found)} of {len(names)}: {one.name}: {one.state}", err=True)
    except (ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        width = max(len(one.name) for one in found)
        for one in found:
            counts = f"{one.comparisons} comparisons, {one.missed} missed, beside {one.references}"
            revision = f" ({one.revision[:12]})" if one.revision else ""
            said = one.note if one.state == "not read" else counts + revision
            click.echo(f"{one.name:<{width}}  {one.state:<8}  {said}")
    states = {one.state for one in found}
    return MISSED if "missed" in states else UNREAD if "not read" in states else 0
