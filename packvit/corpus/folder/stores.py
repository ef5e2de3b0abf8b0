"""A feature folder in an object store: `s3://`, `gs://` or `az://`. No torch.

A `StorePath` stands where a `Path` stands for a local folder: `find_folder` chooses, once, and the
rest of this package asks either the same. It can list, read, write whole, put if absent, remove.

A store has no rename, no append and no lock, and needs none: an object appears whole or not at all.

    data/part-00000.parquet   the bytes of a local part, put first
    _commits/00000.json       then its commit, the line that a local log would have (`objects.py`)
    _manifest.json            put when the job begins, and once more when it is complete
    _lease/00001.json         who may write, while a job runs (`leases.py`)

So a kill at any request leaves parts that have a commit, and maybe one that has none and is put
again. A job resumes by listing the commits and the sizes of the parts. Every request is tried as
often as one over http; what then fails is a StoreError (`requests.py`).
"""

import errno
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packvit.corpus import StoreError, UsageError
from packvit.corpus.folder.requests import STORES, ask, missing
from packvit.corpus.inputs.addresses import SCHEME_LIKE, is_url, protocols, spell

AT_ONCE = 16  # requests, where there are many small ones
BLOCK = 4 << 20  # bytes that are read ahead
NOT_IMPLEMENTED = 501  # an HTTP status


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

    def absolute(self) -> "StorePath":
        """Return this: a URL is the same in every process."""
        return self

    def is_dir(self) -> bool:
        """Return True: in a store any name may have others below it."""
        return True

    def is_symlink(self) -> bool:
        """Return False: a store has no links."""
        return False

    def info(self) -> dict[str, Any] | None:
        """Return what fsspec says of an object or of what has objects below it, or None."""
        try:
            return ask(self.url, "read", lambda files, place: files.info(place))
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Return whether there is an object of this name, or one below it."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Return whether there is an object of this name."""
        return self.size() is not None

    def size(self) -> int | None:
        """Return the bytes of an object, None if there is none."""
        found = self.info()
        return found["size"] if found and found["type"] == "file" else None

    def iterdir(self) -> Iterator["StorePath"]:
        """Yield the paths directly below, of objects and of what has objects below it."""
        try:
            found = ask(
                self.url, "listed", lambda f, place: f.ls(place, detail=False, refresh=True)
            )
        except FileNotFoundError:
            return
        below = [each.strip("/") for each in found]  # an object of this very name is not below it
        names = {each.rpartition("/")[2] for each in below if not self.url.endswith(each)}
        yield from (self / name for name in sorted(names))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all objects below by their names from here."""

        def find(files: Any, place: str) -> dict[str, int]:
            found = files.find(place, detail=True)
            return {name[len(place) + 1 :]: each["size"] for name, each in found.items()}

        try:
            found = ask(self.url, "listed", find)
        except FileNotFoundError:
            return {}
        return {name: size for name, size in found.items() if name and not name.endswith("/")}

    def read_bytes(self) -> bytes:
        """Return an object's bytes.

        Raises: FileNotFoundError; StoreError.
        """
        return ask(self.url, "read", lambda files, place: files.cat_file(place))

    def find_bytes(self) -> bytes | None:
        """Return an object's bytes, None if there is none."""
        try:
            return self.read_bytes()
        except FileNotFoundError:
            return None

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open an object for reading, by ranges.

        Raises: FileNotFoundError; StoreError.
        """
        assert mode == "rb"
        size = self.size()
        if size is None:
            raise missing(self.url)
        return io.BufferedReader(Ranges(self.url, size), BLOCK)

    def write(self, data: Any) -> None:
        """Put an object, in the place of one of this name.

        Raises: StoreError.
        """
        self.check()
        ask(self.url, "written", lambda files, place: files.pipe_file(place, bytes(data)))

    def create(self, data: bytes) -> None:
        """Put an object if there is none of this name: for S3 a put with `If-None-Match: *`.

        Where a store answers that it has no such put, it is looked for first.

        Raises: FileExistsError; StoreError.
        """
        try:
            ask(self.url, "written", lambda f, place: f.pipe_file(place, data, mode="create"))
        except FileExistsError:
            if not data or self.read_bytes() != data:  # ours, if the first answer was lost
                raise
        except StoreError as error:
            if error.status != NOT_IMPLEMENTED:
                raise
            if self.is_file():
                raise FileExistsError(errno.EEXIST, "it is there", self.url) from error
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
            ask(self.url, "removed", lambda files, place: files.rm_file(place))
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
    shown, (protocol, _, rest) = spell(text), text.partition("://")
    if protocol not in STORES or not is_url(text):
        raise UsageError(
            f"{name} is {shown}, but a feature folder is a local folder or lies below s3://, gs:// "
            "or az://. Name a path of these; if a local one really has that name, put ./ before it."
        )
    user = rest.partition("/")[0].rpartition("@")[0]
    is_secret = bool(user) and (protocol != "az" or ":" in user)  # az://container@account
    if is_secret or protocols(text) != [protocol] or "?" in rest or "#" in rest:
        raise UsageError(
            f"{name} is {shown}, which must be a bucket and a name below it, without user, "
            "password, ?, # or others of a chain. Give credentials by the environment or by the "
            "store's own configuration."
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
        path.check()
        ask(path.url, "written", lambda files, place: files.put_file(str(local), place))


def read_many(paths: list[StorePath]) -> list[bytes]:
    """Return the bytes of many small objects, some at a time."""
    with ThreadPoolExecutor(AT_ONCE) as readers:
        return list(readers.map(StorePath.read_bytes, paths))


def remove_many(paths: list[StorePath]) -> None:
    """Remove objects, some at a time; those that are gone already count as removed."""
    with ThreadPoolExecutor(AT_ONCE) as removers:
        list(removers.map(lambda path: path.unlink(missing_ok=True), paths))


class Ranges(io.RawIOBase):
    """An object as a file: each read is a request for a range."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.length, self.place = url, size, 0

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
        data = ask(self.url, "read", lambda f, place: f.cat_file(place, start=start, end=stop))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)
