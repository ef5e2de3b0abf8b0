"""A feature folder in an object store: `s3://`, `gs://` or `az://`, through fsspec. No torch.

A `StorePath` stands where a `Path` stands for a local folder: `find_folder` chooses, once, and the
rest of this package asks either the same. It can list, read, write whole, put if absent, remove.

A store has no rename, no append and no lock, and needs none: an object appears whole or not at all.

    data/part-00000.parquet   the bytes of a local part, put first
    _commits/00000.json       then its commit, the line that a local log would have (`objects.py`)
    _manifest.json            put when the job begins, and once more when it is complete
    _lease/00001.json         who may write, while a job runs (`leases.py`)

So a kill at any request leaves parts that have a commit, and maybe one that has none and is put
again. A job resumes by listing the commits and the sizes of the parts. Every request is tried as
often as one over http; what then fails is a StoreError of one sentence in our words: a library's
message might show what signs a request.
"""

import errno
import io
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from packvit.corpus import StoreError, UsageError
from packvit.corpus.inputs.addresses import SCHEME_LIKE, is_url, protocols, spell

STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # and what fsspec needs for them
AT_ONCE = 16  # requests, where there are many small ones
BLOCK = 4 << 20  # bytes that are read ahead
NOT_IMPLEMENTED = 501  # an HTTP status
SECONDS = 60  # that a server may be silent
CODE = re.compile(r"[A-Za-z]{3,40}", re.ASCII)  # of an error, as servers name them
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StorePath:
    """An object of a store, or all of those whose names begin with this one and a slash.

    `check` is asked before anything is written: it raises StoreError once the folder is another's.
    """

    url: str
    check: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to other processes without the check, which is this one's."""
        return StorePath, (self.url,)

    def __truediv__(self, name: str) -> "StorePath":
        return replace(self, url=f"{self.url}/{name.rstrip('/')}")

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """What this is in."""
        return replace(self, url=self.url.rpartition("/")[0])

    def is_dir(self) -> bool:
        """Return True: in a store any name may have others below it."""
        return True

    def is_symlink(self) -> bool:
        """Return False: a store has no links."""
        return False

    def exists(self) -> bool:
        """Return whether there is an object of this name, or one below it."""
        try:
            ask(self, "read", lambda files, place: files.info(place))
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Return whether there is an object of this name."""
        return self.size() is not None

    def size(self) -> int | None:
        """Return the bytes of an object, None if there is none."""
        try:
            found = ask(self, "read", lambda files, place: files.info(place))
        except FileNotFoundError:
            return None
        return found["size"] if found["type"] == "file" else None

    def names(self) -> list[str]:
        """Return the names directly below, of objects and of what has objects below it."""
        try:
            found = ask(self, "listed", lambda f, place: f.ls(place, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        names = {each.rstrip("/").rpartition("/")[2] for each in found if not is_self(each, self)}
        return sorted(names)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all objects below by their names from here."""
        try:
            found = ask(self, "listed", find_all)
        except FileNotFoundError:
            return {}
        return {name: size for name, size in found.items() if name and not name.endswith("/")}

    def read_bytes(self) -> bytes:
        """Return an object's bytes.

        Raises: FileNotFoundError; StoreError.
        """
        return ask(self, "read", lambda files, place: files.cat_file(place))

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open an object for reading, by ranges.

        Raises: FileNotFoundError; StoreError.
        """
        assert mode == "rb"
        size = self.size()
        if size is None:
            raise missing(self)
        return io.BufferedReader(Ranges(self, size), BLOCK)

    def write(self, data: Any) -> None:
        """Put an object, in the place of one of this name.

        Raises: StoreError.
        """
        self.check()
        ask(self, "written", lambda files, place: files.pipe_file(place, bytes(data)))

    def upload(self, path: Path) -> None:
        """Put a local file's bytes, as `write` does."""
        self.check()
        ask(self, "written", lambda files, place: files.put_file(str(path), place))

    def create(self, data: bytes) -> None:
        """Put an object if there is none of this name: for S3 a put with `If-None-Match: *`.

        Where a store answers that it has no such put, it is looked for first.

        Raises: FileExistsError; StoreError.
        """
        try:
            ask(self, "written", lambda f, place: f.pipe_file(place, data, mode="create"))
        except FileExistsError:
            if not data or self.read_bytes() != data:  # ours, if the first answer was lost
                raise
        except StoreError as error:
            if error.status != NOT_IMPLEMENTED:
                raise
            if self.is_file():
                raise FileExistsError(errno.EEXIST, "it is there", str(self)) from error
            self.write(data)

    def touch(self, *, exist_ok: bool = True) -> None:
        """Put an empty object.

        Raises: FileExistsError unless `exist_ok`; StoreError.
        """
        if exist_ok:
            self.write(b"")
        else:
            self.create(b"")

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove an object.

        Raises: FileNotFoundError unless `missing_ok`; StoreError.
        """
        self.check()
        try:
            ask(self, "removed", lambda files, place: files.rm_file(place))
        except FileNotFoundError:
            if not missing_ok:
                raise


Folder = Path | StorePath


def find_folder(named: object, *, name: str = "out") -> Folder:
    """Return where a feature folder is: on a disk, or in a store if it is named by a URL of one.

    Raises: UsageError for any other URL, and for one with credentials.
    """
    if isinstance(named, (Path, StorePath)):
        return named
    text = str(named)
    if not is_url(text) and not SCHEME_LIKE.match(text):
        return Path(text)
    shown, protocol = spell(text), text.partition("://")[0]
    if protocol not in STORES or not is_url(text):
        raise UsageError(
            f"{name} is {shown}, but a feature folder is a local folder or lies below s3://, gs:// "
            "or az://. Name a path of these; if a local one really has that name, put ./ before it."
        )
    _, _, rest = text.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    if protocols(text) != [protocol] or (user and (protocol != "az" or ":" in user)):
        raise UsageError(
            f"{name} is {shown}, which must be a bucket and a name below it, without user, "
            "password or others of a chain. Give credentials by the environment or by the store's "
            "own configuration."
        )
    if "?" in rest or "#" in rest:
        raise UsageError(
            f"{name} is {shown}, which must be a bucket and a name below it, without ? and #. Give "
            "credentials by the environment or by the store's own configuration."
        )
    bucket, _, inner = rest.rstrip("/").partition("/")
    if not bucket or not inner:
        raise UsageError(
            f"{name} is {shown}, but needs a bucket and a name: {protocol}://bucket/x."
        )
    return StorePath(f"{protocol}://{bucket}/{inner}")


@contextmanager
def uploading(path: StorePath) -> Iterator[Path]:
    """Yield a local file's path; what is written there is put in the store in one step.

    Raises: StoreError.
    """
    with TemporaryDirectory(prefix="packvit-") as folder:
        local = Path(folder) / "file"
        yield local
        path.upload(local)


def read_many(paths: list[StorePath]) -> list[bytes]:
    """Return the bytes of many small objects, some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as readers:
        return list(readers.map(StorePath.read_bytes, paths))


def remove_many(paths: list[StorePath]) -> None:
    """Remove objects, some at a time; those that are gone already count as removed."""
    with ThreadPoolExecutor(AT_ONCE) as removers:
        list(removers.map(partial(StorePath.unlink, missing_ok=True), paths))


class Ranges(io.RawIOBase):
    """An object as a file: each read is a request for a range."""

    def __init__(self, path: StorePath, size: int) -> None:
        self.path, self.length, self.place = path, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a byte."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as the object goes."""
        start, stop = self.place, min(self.place + len(buffer), self.length)
        if start >= stop:
            return 0
        data = ask(self.path, "read", lambda f, place: f.cat_file(place, start=start, end=stop))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def open_files(path: StorePath) -> tuple[Any, str]:
    """Return fsspec's file system for a path, and the path there.

    For S3 it neither caches listings nor tries anything twice: `ask` does that.

    Raises: ImportError with what to install.
    """
    from fsspec.core import url_to_fs

    protocol = path.url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        config = {"connect_timeout": SECONDS, "read_timeout": SECONDS}
        options |= {"config_kwargs": {**config, "retries": {"total_max_attempts": 1}}}
    try:
        files, place = url_to_fs(path.url, **options)
    except ImportError as error:
        raise ImportError(
            f"{path} needs {STORES[protocol]}: pip install 'packvit[{protocol}]'"
        ) from error
    if protocol == "s3":
        files.retries = 1
    return files, place


def find_all(files: Any, place: str) -> dict[str, int]:
    """Return the sizes of all objects below a place by their names from there."""
    found = files.find(place, detail=True)
    return {name[len(place) + 1 :]: each["size"] for name, each in found.items()}


def is_self(found: str, path: StorePath) -> bool:
    """Return whether a listing shows the path itself, as an object of its own name."""
    return path.url.endswith(found.strip("/"))


def ask(path: StorePath, doing: str, call: Callable[[Any, str], Result]) -> Result:
    """Return what a request returns; it is tried again while its error is one that may pass.

    gcsfs and adlfs try again themselves, about as often.

    Raises: FileNotFoundError; FileExistsError; UsageError if there is no such bucket; ImportError;
    StoreError, in one sentence without the library's words.
    """
    from packvit.corpus.inputs.retries import BOUND, retry_after, what_failed

    pauses = BOUND.pauses if path.url.startswith("s3://") else ()
    files, place = open_files(path)
    for tries, least in enumerate((*pauses, None), 1):
        try:
            return call(files, place)
        except Exception as error:  # fsspec's have no common class
            what, asked = what_failed(error), retry_after(error) or 0.0
            if what is None or least is None or asked > BOUND.longest:
                # Its message and its causes may hold a signed request.
                raise explain(path, doing, error, what, tries) from None
        time.sleep(max(least, asked))
    raise AssertionError("the last try returns or raises")


def missing(path: StorePath) -> FileNotFoundError:
    """Return the error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(path))


def explain(
    path: StorePath, doing: str, error: Exception, passing: str | None, tries: int
) -> Exception:
    """Return the error of ours for one of a file system, as `ask` raises it."""
    from packvit.corpus.inputs.retries import causes, find_status

    codes = [code for cause in causes(error) if (code := find_code(cause))]
    statuses = [status for cause in causes(error) if (status := find_status(cause)) is not None]
    status = statuses[-1] if statuses else None
    protocol, _, rest = path.url.partition("://")
    gone = isinstance(error, FileNotFoundError) or status == 404
    if {"NoSuchBucket", "ContainerNotFound"} & {*codes} or (gone and doing == "written"):
        bucket = rest.partition("/")[0]
        return UsageError(f"There is no bucket {protocol}://{bucket}. Create it, or name another.")
    if gone:
        return missing(path)
    if isinstance(error, FileExistsError) or status in (409, 412):
        return FileExistsError(errno.EEXIST, "there is an object of this name", str(path))
    said = ", ".join([*([f"HTTP {status}"] if status else []), *dict.fromkeys(codes)])
    if passing:
        times = f", {tries} times" if tries > 1 else ""
        return StoreError(
            f"{path} could not be {doing}: {passing}{times}. Start the same command again: it "
            "resumes after what is committed.",
            status,
        )
    names = {type(cause).__name__ for cause in causes(error)}
    if status in (401, 403) or isinstance(error, PermissionError) or is_of_credentials(names):
        return StoreError(
            f"{path} could not be {doing}: the store refuses it ({said or min(names)}). Check the "
            f"credentials that {STORES[protocol]} finds, and what they permit.",
            status,
        )
    return StoreError(f"{path} could not be {doing}: {said or type(error).__name__}.", status)


def is_of_credentials(names: set[str]) -> bool:
    """Return whether errors of such classes say that no credentials are found."""
    return any("Credential" in name or "Auth" in name for name in names)


def find_code(error: BaseException) -> str | None:
    """Return the word by which a server names an error, such as AccessDenied, or None."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    found = found or getattr(error, "error_code", None)
    found = getattr(found, "value", found)  # azure has an enumeration
    return found if isinstance(found, str) and CODE.fullmatch(found) else None
