"""`python -m packvit`: the `packvit` command."""

from packvit.cli.program import run

run()
