"""`python -m packvit.cli`: the same command where its script is not on the path."""

from packvit.cli import main

main(prog_name="packvit")
