"""Add named files to a listing: a photograph, or the photographs in an archive. No torch."""

import os

from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import bare, check_protocols, is_url, protocols, spell_bytes
from packvit.corpus.inputs.archives import list_parquet
from packvit.corpus.inputs.beside import read_beside
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.mistakes import shown
from packvit.corpus.inputs.reader import find_url, unreadable
from packvit.corpus.inputs.suffixes import ARCHIVES, PHOTOGRAPHS, UNREAD, suffix_of
from packvit.corpus.inputs.tars import Beside, list_tar
from packvit.corpus.inputs.zips import list_zip
from packvit.images.errors import ImageError
from packvit.images.files import find_file


class NamedFiles:
    """Adds named files to a listing, and the photographs in those that are archives."""

    def __init__(self, listing: Listing, image_column: str, keeping: Keeping) -> None:
        self.listing = listing
        self.image_column = image_column
        self.keeping = keeping
        self.protocols: set[tuple[str, ...]] = set()  # whose packages are known to be installed
        self.empty: list[tuple[bytes, int]] = []  # archives without photographs; their other files

    def add(self, path: bytes, *, alone: bool) -> str | None:
        """Add a named file: the photographs in it if it is an archive, else the file itself.

        Returns the error code if all of it is known to be unreadable.

        Raises: ImageError missing or unreadable for a URL of an archive that lists nothing.
        """
        text = os.fsdecode(path)
        if UNREAD.search(os.fsencode(bare(text))):
            raise UsageError(
                f"{shown(path)} is compressed in a way that is not read: gzip, bzip2, xz and zstd "
                "are. Decompress it to a .tar, which is about as large."
            )
        suffix, remote = suffix_of(text), is_url(text)
        if suffix not in ARCHIVES or not (remote or find_obstacle(path) is None):
            return self.add_file(path, kept=None if remote else read_beside(path, self.keeping))
        if suffix == b".zip" and b"::" in path:  # zip://a.zip::b.zip, a file in a file
            return self.add_file(path)
        prefix = b"" if alone else spell_bytes(path) + b"/"
        before, ignored, distinct = len(self.listing), self.listing.ignored, True
        try:
            if suffix == b".zip":
                found = list_zip(text, PHOTOGRAPHS, self.keeping)
            elif suffix == b".tar":
                found = list_tar(text, PHOTOGRAPHS, self.keeping)
            else:
                found = list_parquet(text, self.image_column, self.keeping)
            for item in found:
                if isinstance(item, bytes):
                    self.listing.pass_over(item)
                elif isinstance(item, Beside):
                    if item.kept:
                        self.listing.add_beside(prefix + item.name, item.kept)
                elif item is not None:
                    self.listing.add(
                        prefix + item.name,
                        path,
                        item.code,
                        item.within,
                        whole=prefix + item.whole,
                        repeats=True,
                        kept=item.kept,
                    )
                else:
                    distinct = False
        except ImageError as error:
            if remote and len(self.listing) == before and error.code in ("missing", "unreadable"):
                raise
            # Its own row says that photographs may be missing.
            self.listing.join_beside(before)
            self.listing.settle(before, distinct=distinct)
            self.listing.add(spell_bytes(path), path, error.code)
            return error.code
        if len(self.listing) == before:
            self.empty.append((path, self.listing.ignored - ignored))
        self.listing.join_beside(before)
        self.listing.settle(before, distinct=distinct)
        return None

    def add_file(
        self, path: bytes, *, repeats: bool = False, kept: str | None = None
    ) -> str | None:
        """Add one file, which is read as a photograph whatever its suffix.

        Returns the error code if it is known to be unreadable.
        """
        code = None
        text = os.fsdecode(path)
        if is_url(text):
            check_protocols(text)
            named = tuple(protocols(text))
            if named not in self.protocols:  # a missing package is reported at once
                try:
                    with unreadable():
                        find_url(text)
                except ImageError:
                    pass  # reading it reports this in its row
                self.protocols.add(named)
        else:
            code = find_obstacle(path)
        self.listing.add(spell_bytes(path), path, code, repeats=repeats, kept=kept)
        return code

    def add_listed(self, path: bytes, kept: str | None) -> None:
        """Add a path of a list; one with a refused protocol becomes an error row."""
        try:
            self.add_file(path, repeats=True, kept=kept)
        except UsageError:
            self.listing.add(spell_bytes(path), path, None, repeats=True, kept=kept)


def find_obstacle(path: bytes) -> str | None:
    """Return the error code if `path` is not a readable regular file, or None.

    Checked before a file is opened, since opening a pipe waits for a writer.
    """
    try:
        find_file(os.fsdecode(path), "list")
    except ImageError as error:
        return error.code
    return None
