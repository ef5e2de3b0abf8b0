"""Try again what a server refuses for a while, a bounded number of times. No torch."""

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from packvit.images.errors import ImageError

Result = TypeVar("Result")

# HTTP statuses that may be others soon: those of servers, but for what they never do. Those of
# content delivery networks, such as 520 and 529, are among them.
BUSY = frozenset({408, 425, 429, *range(500, 600)} - {501, 505, 506, 508, 510, 511})
RESET = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNABORTED)
# Exceptions of aiohttp and httpx for a connection that was cut or was too slow.
CUT = frozenset(
    (
        "ServerDisconnectedError",
        "ClientPayloadError",
        "ServerTimeoutError",
        "ConnectionTimeoutError",
        "SocketTimeoutError",
        "RemoteProtocolError",
        "ReadError",
        "ReadTimeout",
        "ConnectTimeout",
        # Of botocore and azure.
        "EndpointConnectionError",
        "ConnectionClosedError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "ServiceRequestError",
        "ServiceResponseError",
    )
)


@dataclass(frozen=True, slots=True)
class Bound:
    """How often and how long to try. Units: seconds."""

    pauses: tuple[float, ...] = (0.5, 2.0, 8.0)  # before each further try, at least
    longest: float = 20.0  # that a server may ask for by Retry-After, before one try


BOUND = Bound()  # the manifest records it


def persist(read: Callable[[], Result], *, pause: Callable[[float], None] = time.sleep) -> Result:
    """Return what `read` returns; it is tried again while its error is one that may pass.

    `pause` waits for some seconds before each further try.

    Raises: ImageError of the last try, saying how many there were.
    """
    bound = BOUND
    for least in bound.pauses:
        try:
            return read()
        except ImageError as error:
            if not is_passing(error):
                raise
            asked = retry_after(error)
            if asked is not None and asked > bound.longest:
                note = f"its server asks to wait for {asked:,.0f} s"
                raise ImageError(error.code, error.stage, note) from error
        pause(max(least, asked or 0.0))
    try:
        return read()
    except ImageError as error:
        if not is_passing(error):
            raise
        note = f"{what_failed(error)}, {len(bound.pauses) + 1} times"
        raise ImageError(error.code, error.stage, note) from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what caused it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def is_passing(error: ImageError) -> bool:
    """Return whether an error of reading may be gone at the next try."""
    return error.code == "unreadable" and what_failed(error) is not None


def what_failed(error: BaseException) -> str | None:
    """Return in words what may pass: an HTTP status, a timeout, a reset; None for all else."""
    for cause in causes(error):
        status = find_status(cause)
        if status is not None:
            return f"HTTP {status}" if status in BUSY else None
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return "a timeout"
        reset = isinstance(cause, OSError) and cause.errno in RESET
        if reset or isinstance(cause, ConnectionResetError) or type(cause).__name__ in CUT:
            return "a cut connection"
    return None


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that a server asks to wait for, or None.

    Source: RFC 9110, 10.2.3: seconds, or a date.
    """
    for cause in causes(error):
        headers = getattr(cause, "headers", None)
        if headers is None:
            headers = getattr(getattr(cause, "response", None), "headers", None)
        value = headers.get("Retry-After") if headers is not None else None
        if value is None:
            continue
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    return None


def find_status(error: BaseException | None) -> int | None:
    """Return the HTTP status in an exception of aiohttp, the hub or an object store, or None."""
    for name in ("status", "status_code", "code"):  # aiohttp warns of whoever asks for its code
        if isinstance(status := getattr(error, name, None), int):
            return status
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
