"""The one reader of what comes from outside: files and URLs, opened and read within limits.

Every error of reading becomes an ImageError with a code. No torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from io import BytesIO
from typing import Any, Literal

from packvit.corpus import UsageError, WriteError
from packvit.corpus.inputs import limits
from packvit.corpus.inputs.addresses import check_protocols, is_url, protocols, spell
from packvit.corpus.inputs.retries import find_status, persist
from packvit.corpus.inputs.zip_directory import find_directory
from packvit.images.errors import ImageError
from packvit.images.files import MAX_BYTES, check_size, find_file

# The extra that brings what fsspec needs for a protocol.
PACKAGES = {"s3": "'packvit[s3]'", "gs": "'packvit[gs]'", "az": "'packvit[az]'"}
PACKAGES |= {"http": "'packvit[http]'"}
PACKAGES["https"] = PACKAGES["http"]
MOST_WHOLE = limits.MOST_UNDECLARED  # of an answer that fsspec reads whole: a part of a file
GONE = (404, 410)  # HTTP statuses for what does not exist


def find_url(url: str, *, pages: bool = False) -> tuple[Any, str]:
    """Return the fsspec file system that a URL names, and its path there.

    No answer of a web server is read whole beyond a limit; `pages` are those of links.

    Raises: UsageError for a protocol that is not allowed; ImportError with what to install;
    ImageError for a zip whose directory is too long, or that cannot be opened.
    """
    check_protocols(url)
    check_zips(url)
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class

    try:
        options: dict[str, Any] = {"use_listings_cache": False}
        if is_web(url):
            options |= {"get_client": client_of(limits.MOST_PAGE if pages else MOST_WHOLE)}
            if pages:
                options |= {"timeout": time_limit(limits.PAGE_SECONDS)}
        files, place = url_to_fs(url, **options)
    except ImportError as error:
        for protocol in protocols(url):  # of which one is not installed
            try:
                get_filesystem_class(protocol)
            except ImportError:
                package = PACKAGES.get(protocol, f"what fsspec needs for {protocol}")
                raise ImportError(f"{spell(url)} cannot be read: pip install {package}") from error
        raise
    if is_hub(files):
        # It caches listings regardless, also one that failed half-way: files after that would be
        # missing.
        files.dircache.clear()
    return files, place


def check_zips(url: str) -> None:
    """Refuse a chained URL through a zip whose directory fsspec would hold in every worker.

    Raises: ImageError unreadable, or what opening the zip raises.
    """
    links = url.split("::")
    for place, protocol in enumerate(protocols(url)):
        if protocol == "zip" and place + 1 < len(links):
            check_zip("::".join(links[place + 1 :]), os.getpid())


@lru_cache(maxsize=16)  # by process, since it opens what does not survive a fork
def check_zip(archive: str, process: int) -> None:
    """Check one zip, as `check_zips` does."""
    with open_source(archive) as file, unreadable():
        try:
            size = find_directory(file).size
        except ImageError:  # it is no zip: fsspec finds that too
            return
    if size > limits.MOST_DIRECTORY:
        raise ImageError("unreadable", "read", "its zip has too many members; name the zip itself")


def is_hub(files: Any) -> bool:
    """Return whether a file system is huggingface_hub's."""
    return files.protocol == "hf"


def take_for_file(files: Any, place: str, size: int | None) -> None:
    """Enter a file of `size` in the listing cache of the hub's file system.

    Otherwise it lists the whole folder before it reads a file, in each worker.
    """
    name = files.resolve_path(place).unresolve()
    around = name.rpartition("/")[0]
    files.dircache[around] = [{"name": name, "type": "file", "size": size}]


def find_kind(url: str) -> Literal["file", "folder"]:
    """Return whether a URL is a file or a folder, by its server's answer.

    Raises: ImageError missing or unreadable, caused by the file system's exception.
    """
    return persist(lambda: find_kind_once(url))


def find_kind_once(url: str) -> Literal["file", "folder"]:
    """Return or raise as `find_kind` does."""
    with unreadable():
        files, place = find_url(url, pages=True)
        options = {}
        if is_hub(files):
            if not files.resolve_path(place).path:
                return "folder"  # a whole repository
            options = {"expand_info": True}  # or it would list all of the folder around it
        found = files.info(place, **options)
        # Over http everything counts as a file; a page of links is a folder.
        web = {"http", "https"} & set(protocols(url)[:1])
        folder = found["type"] == "directory" or (web and files.ls(place, detail=False))
        return "folder" if folder else "file"


def open_source(path: str) -> Any:
    """Open a file or URL for reading bytes; pipes are refused.

    Returns Any, since fsspec's files act like BinaryIO but are not typed so.

    Raises: ImageError missing, not_a_file or unreadable.
    """

    def open_url() -> Any:
        with unreadable():
            files, place = find_url(path)
            if protocols(path) == ["file"]:
                find_file(place)  # which may be a pipe
            return files.open(place, "rb")

    if is_url(path):
        return persist(open_url)
    with unreadable():
        find_file(path)
        return open(path, "rb")


def find_version(path: str) -> tuple[int, int]:
    """Return what tells the versions of a local file apart: its size and its time of change.

    Raises: ImageError missing, not_a_file or unreadable.
    """
    if is_url(path):
        return 0, 0
    found = find_file(path)
    return found.st_size, found.st_mtime_ns


def open_stream(url: str) -> Any:
    """Open a URL to be read once from its start, in one answer where it is a web server's.

    Raises: ImageError missing, not_a_file or unreadable.
    """
    if not is_web(url):
        return open_source(url)

    def open_url() -> Any:
        with unreadable():
            files, place = find_url(url)
            headers = {**files.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            timeout = time_limit(None, silent=limits.SILENT_SECONDS)
            options = {"headers": headers, "timeout": timeout}
            file = files.open(
                place, "rb", block_size=0, size=1, **options
            )  # any size: else it asks
            if file.r.status != 200:
                raise ImageError("unreadable", "read", f"HTTP {file.r.status}")
            return file

    return persist(open_url)


def read_part_of_url(url: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a URL from `offset` on, or what there is."""
    if not size:
        return b""
    with unreadable():
        files, place = find_url(url)
        options = {}
        if is_web(url):
            return read_part(files, place, offset, size)
        if is_hub(files):
            take_for_file(files, place, offset + size)
            options = {"cache_type": "none"}  # it would read 5 MiB ahead
        data = files.cat_file(place, start=offset, end=offset + size, **options)
        if len(data) > size:  # all of it: from the start, and again for every member
            raise ImageError("unreadable", "read", "its server sends no parts of a file")
        return data


def read_url(url: str) -> bytes:
    """Return the bytes of a URL."""
    with unreadable():
        files, place = find_url(url)
        if is_hub(files):
            take_for_file(files, place, None)
            with files.open(place, "rb", block_size=0) as file:
                data = file.read(MAX_BYTES + 1)
            check_size(len(data))
            return data
        found = files.info(place)
        if found["type"] != "file":
            raise ImageError("not_a_file", "read")
        size = found.get("size") or 0
        packed = found.get("compress_size")  # of a zip's member
        check_size(size)
        if packed is not None:
            limits.check_unpacked(size, packed)
        if is_web(url):
            with files.open(place, "rb", block_size=0, size=size or None) as file:
                if file.r.status not in (200, 206):  # such as 204 and 304, which have no body
                    raise ImageError("unreadable", "read", f"HTTP {file.r.status}")
                packed = "Content-Encoding" in file.r.headers  # the length is that of packed bytes
                return read_bounded(file, max(0 if packed else size, limits.MOST_UNDECLARED))
        if not size:  # its server may not give the size
            with files.open(place, "rb") as file:
                return read_bounded(file, limits.MOST_UNDECLARED)
        return files.cat_file(place, start=0, end=size)


def is_web(url: str) -> bool:
    """Return whether a URL is read over http or https."""
    return protocols(url)[0] in ("http", "https")


def read_part(files: Any, place: str, offset: int, size: int) -> bytes:
    """Return a byte range of a file of a web server, which may ignore the range."""
    headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    headers = {**files.kwargs.get("headers", {}), **headers}
    with files.open(place, "rb", block_size=0, size=size, headers=headers) as file:
        if file.r.status != 206:  # all of it: from the start, and again for every member
            raise ImageError("unreadable", "read", "its server sends no parts of a file")
        return read_bounded(file, size)


def read_bounded(file: Any, most: int) -> bytes:
    """Return the bytes of an open file up to `most`, whatever length its server gave.

    Raises: ImageError unreadable if there are more than `most`.
    """
    data = BytesIO()
    while chunk := file.read(1 << 20):
        if data.tell() + len(chunk) > most:
            raise ImageError("unreadable", "read", "longer than its server said, and than allowed")
        data.write(chunk)
    return data.getvalue()


@contextmanager
def unreadable() -> Iterator[None]:
    """Turn any exception of a file system into an ImageError: fsspec's have no common class.

    UsageError, WriteError and ImportError pass through.
    """
    try:
        yield
    except (ImageError, UsageError, WriteError, ImportError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("missing" if is_gone(error) else "unreadable", "read") from error
    except IsADirectoryError as error:
        raise ImageError("not_a_file", "read") from error
    except MemoryError as error:
        raise ImageError("out_of_memory", "read") from error
    except Exception as error:
        gone = find_status(error) in GONE
        raise ImageError("missing" if gone else "unreadable", "read") from error


def is_gone(error: OSError) -> bool:
    """Return whether the file really does not exist.

    fsspec raises FileNotFoundError for any http error, and the hub for private files; the cause
    has the real answer.
    """
    cause = error.__cause__
    status = find_status(cause)
    if status is not None:
        return status in GONE
    return not (isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp."))


def time_limit(seconds: float | None, *, silent: float | None = None) -> Any:
    """Return what limits the time of a request, in all and while nothing comes.

    aiohttp is imported only when a URL is read.
    """
    import aiohttp

    return aiohttp.ClientTimeout(total=seconds, sock_connect=silent, sock_read=silent)


@lru_cache
def client_of(most: int) -> Any:
    """Return the function that fsspec asks for a session, one object for each limit."""
    return partial(get_bounded_client, most)


async def get_bounded_client(most: int, **options: Any) -> Any:
    """Return a session of aiohttp whose answers, read whole, may have `most` bytes.

    But for `most` it has fsspec's own signature: whatever fsspec gives goes to aiohttp.
    """
    import aiohttp

    return aiohttp.ClientSession(response_class=bounded_response(most), **options)


@lru_cache
def bounded_response(most: int) -> Any:
    """Return the class of such answers."""
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        """An answer whose whole body may have `most` bytes after decompression."""

        async def read(self) -> bytes:
            """Return the body.

            Raises: ImageError unreadable if it is longer.
            """
            if self._body is None:
                body = bytearray()
                async for chunk in self.content.iter_any():
                    body += chunk
                    if len(body) > most:
                        self.close()
                        note = f"an answer of over {most >> 20} MiB"
                        raise ImageError("unreadable", "read", note)
                self._body = bytes(body)
            return self._body

    return BoundedResponse
