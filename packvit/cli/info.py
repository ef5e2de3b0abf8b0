"""`packvit info`: this machine, and the models that packvit supports."""

import json
from typing import Any

import click

from packvit.cli.command import Command
from packvit.cli.options import json_option


@click.command(cls=Command)
@json_option
def info(as_json: bool) -> None:
    """Show the machine, attention backends and why they cannot run, families and checkpoints.

    \b
    Examples:
      packvit info
      packvit info --json | jq .backends
    """
    from packvit.verification.machine import survey

    found = survey()
    click.echo(json.dumps(found, indent=2) if as_json else page(found))


def page(found: dict[str, Any]) -> str:
    """Return the survey as text."""
    lines = ["Machine"]
    lines += [f"  {name:<12} {value}" for name, value in found["machine"].items()]
    for package, one in found["newer_than_tested"].items():
        lines.append(
            f"  {package} {one['installed']} is newer than {one['tested']}, the newest that "
            "packvit was tested with: run `packvit verify`."
        )
    lines += ["", f"Attention backends, for {found['asked']} (auto takes {found['auto']})"]
    lines.append(f"  a call takes: {found['kernel']}")
    for backend in found["backends"]:
        state = "runs here" if backend["obstacle"] is None else f"no: {backend['obstacle']}"
        ran = "" if backend["measured"] else " (not tested by us; choose it by name)"
        lines.append(f"  {backend['name']:<6} {backend['title']}{ran}\n         {state}")
    lines += ["", "Families and their published checkpoints"]
    for family in found["families"]:
        first, more = family["checkpoints"][0], len(family["checkpoints"]) - 1
        lines.append(
            f"  {family['name']:<15} {family['class']:<21} {', '.join(family['layouts'])}: "
            f"{first} and {more} more"
        )
    lines.append("  (all of them by name: packvit info --json)")
    lines += ["", "Text towers, for packvit.load_text"]
    for tower in found["text_towers"]:
        first, more = tower["checkpoints"][0], len(tower["checkpoints"]) - 1
        also = f" and {more} more" if more else ""
        lines.append(f"  {tower['name']:<15} compares with {tower['space']}: {first}{also}")
    lines += ["", "Embedded models"]
    lines += [f"  {name:<12} {folder}" for name, folder in found["embedded"].items()]
    return "\n".join(lines)
