"""The embedding job: photographs in, a feature folder out, one row for every input."""

import warnings


class UsageError(ValueError):
    """Arguments that cannot be used as given; the message says what to give instead."""


class WriteError(OSError):
    """A file could not be written or read; parts committed before it stay whole."""


def no_room_for(what: str, error: object) -> WriteError:
    """Return the error for what could not be written to a temporary file."""
    return WriteError(
        f"{what} to a temporary file: {error}. Make room there, or set TMPDIR to a folder that has "
        "some."
    )


class StoreError(RuntimeError):
    """An object store refuses or fails; the message says which request, and how.

    `status` is the HTTP status, where there was an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DecoderError(RuntimeError):
    """Decode workers cannot run at all; an error of a single image is recorded in its row."""


class EmbedderError(RuntimeError):
    """An embedding process died repeatedly, or would write other numbers than the job."""


def __getattr__(name: str) -> type[UsageError]:
    """Return UsageError under its old name, `WrongUse`, with a warning."""
    if name == "WrongUse":
        warnings.warn(
            "packvit.corpus.WrongUse was renamed: import UsageError instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        return UsageError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
