"""`python -m packvit.cli`: the `packvit` command without its script on the path."""

from packvit.cli import main

main(prog_name="packvit")
