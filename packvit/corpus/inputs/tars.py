"""What lies in a tar: photographs, known by their places. No torch.

Nothing is unpacked. Archives that were joined end to end, as `cat` joins them, are read to the end
of the last, as `tar --ignore-zeros` does. Sizes are checked before they are used.
"""

import os
import re
import tarfile
from collections.abc import Generator, Iterator
from typing import Any

from packvit.corpus.inputs.sources import Cell, Member, open_source, unreadable
from packvit.images.decode import ImageError

# A sample's key: its path up to the first dot of its name. Source: webdataset 1.0, tariterators.py.
KEY = re.compile(rb"((?:.*/)?[^./][^./]*)\.[^/]*", re.DOTALL)
BLOCK = 512  # of a tar
MOST_HEADER = 8 << 20  # bytes of a long name or of pax records, which are read whole
MOST_ZEROS = 64 << 20  # bytes between joined archives: tar pads to 10 KiB, some tools to 1 MiB
MOST_BYTES = 2**62  # of an archive whose length nobody tells

# Headers whose data say more of the member behind them; tarfile reads such data whole.
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

# An archive's photograph: its key or short name, its whole name, where it lies, or why nowhere.
Found = tuple[bytes, bytes, Member | Cell | None, str | None]


class Header(tarfile.TarInfo):
    """A member's header whose size was checked: tarfile itself seeks and reads by any."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        """Return the header in a block.

        Raises: ImageError truncated for a size that none can have; tarfile's errors.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENDED and header.size > MOST_HEADER):
            raise ImageError("truncated", "list")
        return header


def list_tar(path: str, suffixes: frozenset[bytes]) -> Iterator[Found | bytes]:
    """Yield the photographs of a tar, and the name of every other file in it.

    Folders and links that are called like photographs, and files stored with holes, are errors.

    Raises: ImageError truncated, after what is there, if it is damaged; or what opening it raises.
    """
    with open_source(path) as file, unreadable():
        try:
            length = find_length(file)
            start: int | None = 0
            while start is not None:
                start = yield from list_archive(file, start, length, suffixes)
        # What tarfile raises of damaged headers.
        except (
            tarfile.TarError,
            EOFError,
            ValueError,
            ArithmeticError,
            LookupError,
            RecursionError,
        ) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError("truncated", "list") from error


def list_archive(
    file: Any, start: int, length: int, suffixes: frozenset[bytes]
) -> Generator[Found | bytes, None, int | None]:
    """Yield what `list_tar` does, of the archive at `start`; return where another begins, or None.

    Raises: ImageError truncated; tarfile's errors.
    """
    file.seek(start)
    tar: Any = tarfile.open(  # noqa: SIM115 # closing it would do nothing: the file is ours
        fileobj=file, mode="r:", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
    )
    before = start
    while member := tar.next():
        tar.members.clear()  # or it would keep them all
        if member.size < 0 or tar.offset <= before:  # a pax record may have set another size
            raise ImageError("truncated", "list")
        before = tar.offset
        yield from describe(member, length, suffixes)
        if before > length + BLOCK:  # which a seek may refuse
            raise ImageError("truncated", "list")
    # tarfile takes a header that it can't read for the end.
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise ImageError("truncated", "list")
    return find_next(file, tar.offset + BLOCK)


def describe(member: Any, length: int, suffixes: frozenset[bytes]) -> Iterator[Found | bytes]:
    """Yield what a member is, unless it is a folder; of one to be passed over its name."""
    name = member.name.encode("utf-8", "surrogateescape")
    if os.path.splitext(name)[1].lower() not in suffixes:
        if not member.isdir():
            yield name
        return
    key = KEY.fullmatch(name)
    code = None
    if member.issparse():
        code = "unreadable"
    elif not member.isreg():
        code = "not_a_file"
    elif member.offset_data + member.size > length:
        code = "truncated"
    place = None if code else Member(member.offset_data, member.size)
    yield key[1] if key else name, name, place, code


def find_next(file: Any, start: int) -> int | None:
    """Return where behind the zeros from `start` on something stands, or None if nothing does.

    Raises: ImageError truncated if there are more zeros than any tool writes.
    """
    for step in range(start, start + MOST_ZEROS, 1 << 20):
        data = file.read(1 << 20)
        if data.strip(b"\0"):
            first = len(data) - len(data.lstrip(b"\0"))
            return step + first // BLOCK * BLOCK
        if len(data) < 1 << 20:
            return None
    raise ImageError("truncated", "list")


def find_length(file: Any) -> int:
    """Return how many bytes an open file has; where its server does not tell, more than any has."""
    size = getattr(file, "size", None)
    if size is None and hasattr(file, "fileno"):
        try:
            size = os.fstat(file.fileno()).st_size
        except (OSError, ValueError):  # a remote file has no descriptor
            size = None
    return MOST_BYTES if size is None else size
