"""The `packvit` command: one module per subcommand, loaded when it runs.

All commands: results go to stdout and remarks to stderr; `--json` prints JSON for programs; a wrong
argument gives one sentence and exit code 2, never a traceback; torch is imported only by commands
that compute with it.
"""

import signal
from difflib import get_close_matches
from importlib import import_module
from types import FrameType

import click

from packvit.cli.command import HELP, Mistake, mistakes_first
from packvit.out_of_memory import has_room_to_start, is_out_of_memory
from packvit.version import VERSION

COMMANDS = {  # in the order of `--help`
    "embed": "packvit.cli.embed",
    "merge": "packvit.cli.merge",
    "check": "packvit.cli.check",
    "verify": "packvit.cli.verify",
    "bench": "packvit.cli.bench",
    "convert": "packvit.cli.convert",
    "info": "packvit.cli.info",
    "warmup": "packvit.cli.warmup",
    "pca": "packvit.cli.pca",
    "search": "packvit.cli.search",
    "dups": "packvit.cli.dups",
    "zeroshot": "packvit.cli.zeroshot",
    "evaluate": "packvit.cli.evaluate",
}


DONE_WITH_ERRORS = 3  # exit code of a job with rows that are errors


class Terminated(KeyboardInterrupt):
    """SIGTERM came; it stops a command as Ctrl-C does."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a stopped command: 128 plus the signal, as in shells."""
    return 143 if isinstance(stop, Terminated) else 130


class Commands(click.Group):
    """A group that imports a command only when it is named."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; Ctrl-C and SIGTERM stop it cleanly, with the exit codes of shells."""

        def terminate(number: int, frame: FrameType | None) -> None:
            raise Terminated

        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's & leaves it
            signal.signal(signal.SIGINT, signal.default_int_handler)  # after `__main__.stop`
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            click.echo("Stopped. Run the same command again to start over.", err=True)
            ctx.exit(exit_code(stop))
        except Exception as error:
            if isinstance(error, click.exceptions.Exit) or not is_out_of_memory(error):
                raise
            raise click.ClickException(NO_MEMORY) from error
        finally:
            signal.signal(signal.SIGTERM, before)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options before the command; what they get wrong is the first line."""
        with mistakes_first(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is named.

        Raises: Mistake naming what a misspelt one may mean.
        """
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = get_close_matches(name.lower(), COMMANDS, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(COMMANDS)}."
            raise Mistake(f"No such command '{name}'. {meant}", ctx, hint=True)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command called `cmd_name`, or None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        if not has_room_to_start(torch=cmd_name != "check"):
            raise click.ClickException(NO_MEMORY)
        return getattr(import_module(COMMANDS[cmd_name]), cmd_name)


NO_MEMORY = (
    "Memory ran out. Choose a smaller model, or give this more memory; what bounds it here may be "
    "ulimit, a container, or the GPU."
)


@click.group(cls=Commands, context_settings={"help_option_names": HELP})
@click.version_option(VERSION, prog_name="packvit")
def main() -> None:
    """Vision encoders on packs: one forward for images of any size.

    \b
    Examples:
      packvit embed photos --out features
      packvit embed photos --model apple/aimv2-large-patch14-native --out features
      packvit pca photos --out pca.png
      packvit search features cat.jpg --out like.jpg
      packvit info
    """


def help_page() -> str:
    """Return docs/cli.md: what `--help` prints for the command and each of its subcommands."""
    context = click.Context(main, info_name="packvit", terminal_width=88)
    commands: dict[str, click.Command] = {"packvit": main}
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None  # COMMANDS names it
        commands[f"packvit {name}"] = command
    page = ["# Command line\n\nWritten by `help_page()`; a test fails when it is out of date.\n"]
    for name, command in commands.items():
        shown = command.make_context(name, [], resilient_parsing=True, terminal_width=88)
        page.append(f"## {name}\n\n```\n{command.get_help(shown)}\n```\n")
    return "\n".join(page)
