"""`python -m packvit.cli`: the `packvit` command without its script on the path."""

from packvit.cli.program import run

run()
