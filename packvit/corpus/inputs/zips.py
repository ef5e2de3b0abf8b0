"""List the photographs in a zip file by the URLs of its members, which fsspec reads. No torch."""

import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.reader import open_source, unreadable
from packvit.corpus.inputs.tars import ArchiveEntry, Beside
from packvit.images.decode import ImageError

ENCRYPTED = 1  # in a member's flags
# What zipfile raises for members that it cannot read: damaged, encrypted, of another compression.
UNREAD = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)


def list_zip(
    path: bytes, suffixes: frozenset[bytes], keeping: Keeping
) -> Iterator[ArchiveEntry | Beside | bytes | None]:
    """Yield the photographs of a zip, what comes with them, and the names of all other files.

    A photograph's short name is its path without its suffix, which files that come with it share.
    None is yielded too, since it names no row.

    Raises: ImageError truncated if it is damaged, or what opening it raises.
    """
    yield None
    with open_source(os.fsdecode(path)) as file, unreadable():
        try:
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise ImageError("truncated", "list") from error
        for member in members:
            name = member.filename.encode("utf-8", "surrogateescape").rstrip(b"/")
            stem, suffix = os.path.splitext(name)
            code = None
            if suffix.lower() in suffixes:
                if member.is_dir():
                    code = "not_a_file"
                elif member.flag_bits & ENCRYPTED or b"::" in name:  # which fsspec takes for an end
                    code = "unreadable"
                yield ArchiveEntry(stem, name, None, code, path=member_url(name, path))
            elif member.is_dir():
                continue
            elif keeping and keeping.wants_member(
                extension := suffix[1:].decode("utf-8", "replace")
            ):
                data = read_small(archive, member)
                yield Beside(stem, keeping.read(extension, data, member.filename))
            else:
                yield name


def read_small(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | None:
    """Return the first bytes of a member, one more than is kept; None if it cannot be read."""
    try:
        with archive.open(member) as file:
            return file.read(limits.MOST_VALUES + 1)
    except (*UNREAD, lzma.LZMAError):
        return None


def member_url(name: bytes, path: bytes) -> bytes:
    """Return the URL of a member."""
    return b"zip://" + name + b"::" + path
