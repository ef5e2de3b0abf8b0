"""The errors for paths that lead to no inputs."""

from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import spell_bytes
from packvit.corpus.inputs.listing import readable
from packvit.corpus.inputs.retries import find_status
from packvit.corpus.inputs.suffixes import SUFFIXES
from packvit.images.errors import ImageError


def shown(path: bytes) -> str:
    """Return a path for messages."""
    return readable(spell_bytes(path))


def not_there(paths: list[bytes]) -> UsageError:
    """Return the error for paths that do not exist."""
    named = ", ".join(f'"{shown(path)}"' for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return UsageError(
        f"{named}{more} {'is' if len(paths) == 1 else 'are'} not there. Check the spelling; "
        "nothing was written."
    )


def no_photographs(empty: list[tuple[bytes, int]]) -> UsageError:
    """Return the error for archives without photographs, if there are no other inputs."""
    named = ", ".join(shown(path) for path, _ in empty[:3])
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return UsageError(
        f"{named}{more} {'holds' if len(empty) == 1 else 'hold'} no photographs, but "
        f"{sum(others for _, others in empty)} other files. Photographs in an archive end in "
        f"{b' '.join(SUFFIXES).decode()}."
    )


def no_answer(path: bytes, error: ImageError) -> UsageError:
    """Return the error for a URL whose server gives no answer; `error` has the causes."""
    cause: BaseException = error
    while cause.__cause__ and find_status(cause) is None:
        cause = cause.__cause__
    status = find_status(cause)
    what = type(cause).__name__ + (f" {status}" if status else "")
    return UsageError(
        f'"{shown(path)}" cannot be read ({what}). Check the address, '
        "the credentials that its server asks for, and whether the server answers; nothing was "
        "written."
    )
