"""Read folders, local ones and those at URLs, entry by entry. No torch."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from packvit.corpus.inputs.addresses import spell_bytes
from packvit.corpus.inputs.listing import Listing
from packvit.corpus.inputs.reader import find_url, unreadable
from packvit.corpus.inputs.retries import persist
from packvit.corpus.inputs.suffixes import is_photograph
from packvit.images.errors import ImageError

MOST_DEPTH = 32  # nested pages of links

Page = tuple[bytes, int, int]  # of the web: a digest of its links, its depth, its repeats


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder."""

    name: bytes
    path: bytes
    is_folder: bool
    is_linked_folder: bool = False


def walk(listing: Listing, chain: bytes, *, remote: bool) -> Iterator[tuple[Entry, bytes]]:
    """Yield the entries of all pending folders of a listing, with their names.

    A folder that cannot be read becomes an error row, since photographs may be missing.

    Raises: ImageError if the first folder is remote and cannot be read.
    """
    first = True
    pages: dict[bytes, Page] = {}
    web = remote and not chain
    while found := listing.pop():
        folder, prefix = found
        try:
            entries = read_url_folder(folder, chain) if remote else read_folder(folder)
            if web and folder.startswith((b"http://", b"https://")):
                entries = read_page(folder, list(entries), pages, first=first)
            for entry in entries:
                yield entry, prefix + entry.name
        except (OSError, ImageError):
            if first and remote:
                raise
            name = prefix.rstrip(b"/") or folder
            if not is_photograph(name):  # with such a suffix it is a row already
                listing.add(spell_bytes(name), folder + chain, "unreadable")
        first = False


def read_page(
    folder: bytes, entries: list[Entry], pages: dict[bytes, Page], *, first: bool
) -> list[Entry]:
    """Return the links of a page, unless it repeats the page above it.

    A page that links to itself under a new address at each level would be walked without end;
    such a page has the same links as the page above it.

    Raises: ImageError unreadable for such a page, or one too deep.
    """
    links = hashlib.sha256(b"\0".join(sorted(entry.name for entry in entries)))
    above, depth, repeats = None, 0, 0
    if not first:
        parent = folder.rstrip(b"/").rpartition(b"/")[0]
        above, depth, repeats = pages.get(parent, (None, 0, 0))
    repeats = repeats + 1 if above == links.digest() else 0
    again = repeats > 0 and not all(entry.is_folder for entry in entries)
    if again or repeats > 1 or depth >= MOST_DEPTH:
        raise ImageError("unreadable", "list")
    if any(entry.is_folder for entry in entries):
        pages[folder.rstrip(b"/")] = (links.digest(), depth + 1, repeats)
    return entries


def read_folder(folder: bytes) -> Iterator[Entry]:
    """Yield the entries of `folder` in the file system's order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            inside = entry.is_dir(follow_symlinks=False)
            linked = not inside and entry.is_symlink() and os.path.isdir(entry.path)
            yield Entry(entry.name, entry.path, inside, linked)


def read_url_folder(folder: bytes, chain: bytes) -> Iterator[Entry]:
    """Yield the entries of a folder at a URL, whose last links are `chain`."""
    url = os.fsdecode(folder + chain)

    def read() -> tuple[list[dict[str, Any]], str]:
        with unreadable():
            files, place = find_url(url, pages=True)
            return files.ls(place, detail=True), place

    found, place = persist(read)
    for item in found:
        name = os.fsencode(item["name"].rstrip("/").rpartition("/")[2])
        itself = item["name"].rstrip("/") == place.rstrip("/") or name in (b".", b"..")
        if not itself:  # some servers list a folder in itself
            path = folder.rstrip(b"/") + b"/" + name
            if folder.endswith(b"://"):
                path = folder + name
            yield Entry(name, path, item["type"] == "directory")
