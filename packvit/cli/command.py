"""How commands answer a mistake: one sentence first, with options as they are typed. No torch.

The library's messages name Python's arguments; here they become the command's options. A message
marks them by an underscore, by `name=value`, by backquotes, or by starting a sentence with them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from packvit.checkpoints.errors import CheckpointError
from packvit.corpus import DecoderError, EmbedderError, StoreError, UsageError, WriteError
from packvit.verification import VerificationError

ASSIGNED = re.compile(r"`?\b([a-z_]+)=(?:\"([^\"`]*)\"|(True|False)|([\w.-]+))`?")
QUOTED = re.compile(r"`([a-z_]+)`")
SUBJECT = re.compile(r"(?:^|(?<=\. ))([a-z_]+)(?= (?:is|asks|cannot|names)\b)")
IDENTIFIER = re.compile(r"(?<![\w./\"'=-])([a-z]+(?:_[a-z]+)+)(?![\w/=\"'-]|\.\w)")
# Errors of the library whose message is for the user: one sentence, and exit code 1.
FAILURES = (
    *(CheckpointError, DecoderError, EmbedderError, ImportError, StoreError, VerificationError),
    WriteError,
)
HELP = ["-h", "--help"]


class Mistake(click.UsageError):
    """Wrong use; only a mistake in the words of a command is followed by where its help is."""

    def __init__(self, message: str, ctx: click.Context | None, *, hint: bool) -> None:
        super().__init__(message, ctx)
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the error first."""
        click.echo(f"Error: {self.format_message()}", file=file, err=file is None)
        if self.hint and self.ctx is not None:
            click.echo(f"Try '{self.ctx.command_path} -h' for help.", file=file, err=file is None)


@contextmanager
def mistakes_first(ctx: click.Context) -> Iterator[None]:
    """Turn click's errors of wrong use into mistakes, whose first line says what is wrong."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Mistake(error.format_message(), error.ctx or ctx, hint=True) from error


class Command(click.Command):
    """A command that answers mistakes in its own options' words."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return both names, also where the command is run by itself: click keeps the first."""
        return HELP

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options; what they get wrong is the first line."""
        with mistakes_first(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the one place that turns the library's errors into the command's."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            said = in_options(error.format_message(), self)
            raise Mistake(said, ctx, hint=isinstance(error, click.MissingParameter)) from error
        except click.ClickException as error:
            raise click.ClickException(in_options(error.message, self)) from error
        except UsageError as error:
            raise Mistake(in_options(str(error), self), ctx, hint=False) from error
        except FAILURES as error:
            raise click.ClickException(in_options(str(error), self)) from error


def in_options(message: str, command: click.Command) -> str:
    """Return a message of the library with its arguments as the options of a command."""
    options: dict[str, str] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name:
            long = next((name for name in parameter.opts if name.startswith("--")), "")
            options[parameter.name.rstrip("_")] = long
            options[long.removeprefix("--").replace("-", "_")] = long

    def assigned(found: re.Match[str]) -> str:
        option = options.get(found[1])
        value = found[2] or found[4] or ""
        return found[0] if not option else f"{option} {value}".strip()

    def named(found: re.Match[str]) -> str:
        return options.get(found[1]) or found[0]

    said = ASSIGNED.sub(assigned, message)
    for pattern in (QUOTED, SUBJECT, IDENTIFIER):
        said = pattern.sub(named, said)
    return said


def printable(name: str) -> str:
    """Return a file's name with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
