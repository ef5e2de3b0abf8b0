"""List the photographs in a zip file by the URLs of its members, which fsspec reads. No torch."""

import os
import zipfile
from collections.abc import Iterator

from packvit.corpus.inputs.reader import open_source, unreadable
from packvit.images.decode import ImageError

ENCRYPTED = 1  # in a member's flags


def list_zip(path: str, suffixes: frozenset[bytes]) -> Iterator[tuple[bytes, str | None] | bytes]:
    """Yield the photographs of a zip by name and error code, and the names of all other files.

    Raises: ImageError truncated if it is damaged, or what opening it raises.
    """
    with open_source(path) as file, unreadable():
        try:
            members = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise ImageError("truncated", "list") from error
        for member in members:
            name = member.filename.encode("utf-8", "surrogateescape")
            if os.path.splitext(name.rstrip(b"/"))[1].lower() not in suffixes:
                if not member.is_dir():
                    yield name
            elif member.is_dir():
                yield name.rstrip(b"/"), "not_a_file"
            else:  # fsspec would take :: for the end of its name
                refused = member.flag_bits & ENCRYPTED or b"::" in name
                yield name, "unreadable" if refused else None


def member_url(name: bytes, path: bytes) -> bytes:
    """Return the URL of a member."""
    return b"zip://" + name + b"::" + path
