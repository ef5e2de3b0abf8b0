"""List the photographs in a tar by their offsets. No torch.

No member is unpacked. Concatenated archives are read to the end of the last one, as by
`tar --ignore-zeros`. Sizes are checked before they are used.
"""

import os
import re
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.reader import open_source, unreadable
from packvit.corpus.inputs.sources import Cell, Member
from packvit.corpus.inputs.suffixes import is_packed
from packvit.corpus.inputs.unpacking import Unpacked, is_compressed
from packvit.corpus.inputs.zipped import Zipped
from packvit.images.errors import ImageError

# A sample's key: its path up to the first dot of its name. Source: webdataset 1.0, tariterators.py.
KEY = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
BLOCK = 512  # of a tar
MOST_HEADER = 8 << 20  # bytes of a long name or of pax records, which are read whole
MOST_GLOBAL = 1 << 16  # characters of the records for all members: git writes one of 52
MOST_ZEROS = 64 << 20  # bytes between joined archives: tar pads to 10 KiB, some context to 1 MiB
MOST_BYTES = 2**62  # of an archive whose length is unknown

# Headers whose data describe the next member; tarfile reads such data whole.
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A photograph in an archive: its key or short name, its whole name, its place, or its code."""

    name: bytes
    whole: bytes
    within: Member | Zipped | Cell | None
    code: str | None = None
    kept: str | None = None  # what comes with it, as a JSON object


@dataclass(frozen=True, slots=True)
class Beside:
    """What comes with the photographs of a key, as a JSON object."""

    name: bytes
    kept: str | None


class Header(tarfile.TarInfo):
    """A member's header with a checked size, which tarfile does not check."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        """Return the header in a block.

        Raises: ImageError truncated for an impossible size; tarfile's errors.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENDED and header.size > MOST_HEADER):
            raise ImageError("truncated", "list")
        return header

    def _proc_sparse(self, tarfile: Any) -> Any:
        """Pass over the map of an old sparse file, which tarfile would keep: it is not read."""
        _, more, _ = self._sparse_structs  # pyright: ignore # what tarfile itself keeps
        while more:
            more = bool(tarfile.fileobj.read(BLOCK)[504])
        self.sparse: Any = []
        self.offset_data = tarfile.fileobj.tell()
        tarfile.offset = self.offset_data + -(-self.size // BLOCK) * BLOCK
        return self


class GlobalRecords(dict[str, str]):
    """The pax records that hold for all members that follow, each of which tarfile gives a copy."""

    length = 0

    def __setitem__(self, name: str, value: str) -> None:
        """Add a record.

        Raises: ImageError truncated if there are more than any tool writes.
        """
        self.length += len(name) + len(value)
        if self.length > MOST_GLOBAL:
            raise ImageError("truncated", "list")
        super().__setitem__(name, value)


def list_tar(
    path: str, suffixes: frozenset[bytes], keeping: Keeping
) -> Iterator[ArchiveEntry | Beside | bytes]:
    """Yield the photographs of a tar, what comes with them, and the names of all other files.

    Folders and links named like photographs, and sparse files, are errors. A compressed tar is told
    by its first bytes, whatever it is called.

    Raises: ImageError truncated, after the readable members, if it is damaged; or what opening it
    raises.
    """
    packed = is_packed(path) or is_compressed(path)
    with Unpacked(path) if packed else open_source(path) as file, unreadable():
        try:
            length = find_length(file)
            start: int | None = 0
            while start is not None:
                start = yield from list_archive(file, start, length, suffixes, keeping)
        # What tarfile raises for damaged headers.
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
    file: Any, start: int, length: int, suffixes: frozenset[bytes], keeping: Keeping
) -> Generator[ArchiveEntry | Beside | bytes, None, int | None]:
    """Yield the photographs of the archive at `start`; return the start of the next, or None.

    Raises: ImageError truncated; tarfile's errors.
    """
    file.seek(start)
    tar: Any = tarfile.open(  # noqa: SIM115 # closing it would do nothing: the file is ours
        fileobj=file,
        mode="r:",
        tarinfo=Header,
        encoding="utf-8",
        errors="surrogateescape",
        pax_headers=GlobalRecords(),
    )
    before = start
    while member := tar.next():
        tar.members.clear()  # tarfile would keep all of them
        if member.size < 0 or tar.offset <= before:  # a pax record may have set another size
            raise ImageError("truncated", "list")
        before = tar.offset
        found = read_beside(file, member, keeping) if keeping and member.isreg() else None
        packed = isinstance(file, Unpacked)
        yield from (found,) if found else describe_member(member, length, suffixes, packed=packed)
        if before > length + BLOCK:  # which a seek may refuse
            raise ImageError("truncated", "list")
    # tarfile takes an unreadable header for the end.
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise ImageError("truncated", "list")
    return find_next(file, tar.offset + BLOCK)


def read_beside(file: Any, member: Any, keeping: Keeping) -> Beside | None:
    """Return what a member says of the photographs of its key; None if that is not asked for.

    Source: webdataset's members of one sample have one key, and their extensions say what they are.
    """
    key = KEY.fullmatch(member.name.encode("utf-8", "surrogateescape"))
    extension = key[2].decode("utf-8", "backslashreplace") if key else ""
    if key is None or not keeping.wants_member(extension):
        return None
    where = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    data = None
    if not member.issparse():
        file.seek(member.offset_data)
        data = file.read(min(member.size, limits.MOST_VALUES + 1))
    return Beside(key[1], keeping.read(extension, data, where))


def describe_member(
    member: Any, length: int, suffixes: frozenset[bytes], *, packed: bool
) -> Iterator[ArchiveEntry | bytes]:
    """Yield the entry of a member, the name of other files, nothing for folders."""
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
    place = None if code else Member(member.offset_data, member.size, packed)
    yield ArchiveEntry(key[1] if key else name, name, place, code)


def find_next(file: Any, start: int) -> int | None:
    """Return the offset of the first block after `start` that is not zero, or None.

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
    """Return the length of an open file, or MOST_BYTES if its server does not give it."""
    size = getattr(file, "size", None)
    if size is None and hasattr(file, "fileno"):
        try:
            size = os.fstat(file.fileno()).st_size
        except (OSError, ValueError):  # a remote file has no descriptor
            size = None
    return MOST_BYTES if size is None else size
