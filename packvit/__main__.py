"""`python -m packvit`: the `packvit` command."""

from packvit.cli import main

main(prog_name="packvit")
