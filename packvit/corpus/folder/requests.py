"""A request to an object store through fsspec: tried again for a while, its error in our words.

A library's message might show what signs a request, so none of it is repeated. No torch.
"""

import errno
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from packvit.corpus import StoreError, UsageError

STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # and what fsspec needs for them
SECONDS = 60  # that a server may be silent
CODE = re.compile(r"[A-Za-z]{3,40}", re.ASCII)  # of an error, as servers name them
Result = TypeVar("Result")


def ask(url: str, doing: str, call: Callable[[Any, str], Result]) -> Result:
    """Return what a request returns; it is tried again while its error is one that may pass.

    gcsfs and adlfs try again themselves, about as often.

    Raises: FileNotFoundError; FileExistsError; UsageError if there is no such bucket; ImportError;
    StoreError, in one sentence without the library's words.
    """
    from packvit.corpus.inputs.retries import BOUND, retry_after, what_failed

    pauses = BOUND.pauses if url.startswith("s3://") else ()
    files, place = open_files(url)
    for tries, least in enumerate((*pauses, None), 1):
        try:
            return call(files, place)
        except Exception as error:  # fsspec's have no common class
            what, asked = what_failed(error), retry_after(error) or 0.0
            if what is None or least is None or asked > BOUND.longest:
                # Its message and its causes may hold a signed request.
                raise explain(url, doing, error, what, tries) from None
        time.sleep(max(least, asked))
    raise AssertionError("the last try returns or raises")


def open_files(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path there.

    For S3 it neither caches listings nor tries anything twice: `ask` does that.

    Raises: ImportError with what to install.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        config = {"connect_timeout": SECONDS, "read_timeout": SECONDS}
        options |= {"config_kwargs": {**config, "retries": {"total_max_attempts": 1}}}
    try:
        files, place = url_to_fs(url, **options)
    except ImportError as error:
        raise ImportError(
            f"{url} needs {STORES[protocol]}: pip install 'packvit[{protocol}]'"
        ) from error
    if protocol == "s3":
        files.retries = 1
    return files, place


def explain(url: str, doing: str, error: Exception, passing: str | None, tries: int) -> Exception:
    """Return the error of ours for one of a file system, as `ask` raises it."""
    from packvit.corpus.inputs.retries import causes, find_status

    codes = [code for cause in causes(error) if (code := find_code(cause))]
    statuses = [status for cause in causes(error) if (status := find_status(cause)) is not None]
    status = statuses[-1] if statuses else None
    protocol, _, rest = url.partition("://")
    gone = isinstance(error, FileNotFoundError) or status == 404
    if {"NoSuchBucket", "ContainerNotFound"} & {*codes} or (gone and doing == "written"):
        bucket = rest.partition("/")[0]
        return UsageError(f"There is no bucket {protocol}://{bucket}. Create it, or name another.")
    if gone:
        return missing(url)
    if isinstance(error, FileExistsError) or status in (409, 412):
        return FileExistsError(errno.EEXIST, "there is an object of this name", url)
    said = ", ".join([*([f"HTTP {status}"] if status else []), *dict.fromkeys(codes)])
    if passing:
        times = f", {tries} times" if tries > 1 else ""
        again = ": a job resumes after what is committed." if doing == "written" else "."
        return StoreError(
            f"{url} could not be {doing}: {passing}{times}. Start the same command again{again}",
            status,
        )
    names = {type(cause).__name__ for cause in causes(error)}
    no_credentials = any("Credential" in name or "Auth" in name for name in names)
    if status in (401, 403) or isinstance(error, PermissionError) or no_credentials:
        return StoreError(
            f"{url} could not be {doing}: the store refuses it ({said or min(names)}). Check the "
            f"credentials that {STORES[protocol]} finds, and what they permit.",
            status,
        )
    return StoreError(f"{url} could not be {doing}: {said or type(error).__name__}.", status)


def missing(url: str) -> FileNotFoundError:
    """Return the error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, "there is no such object", url)


def find_code(error: BaseException) -> str | None:
    """Return the word by which a server names an error, such as AccessDenied, or None."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    found = found or getattr(error, "error_code", None)
    found = getattr(found, "value", found)  # azure has an enumeration
    return found if isinstance(found, str) and CODE.fullmatch(found) else None
