"""Find the photographs that a job embeds, name them, and sort them. No torch.

Every file is accounted for: a path with the suffix of a photograph that is not a regular file is an
input with an error, and files with other suffixes are counted.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from packvit.corpus import UsageError
from packvit.corpus.inputs import patterns as globs
from packvit.corpus.inputs.addresses import (
    bare,
    check_protocols,
    is_url,
    protocols,
    spell,
    spell_bytes,
)
from packvit.corpus.inputs.archives import list_parquet
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.listing import Listing, by_suffix, readable, spooling
from packvit.corpus.inputs.lists import looks_like_list, read_list
from packvit.corpus.inputs.reader import find_kind, find_url, unreadable
from packvit.corpus.inputs.retries import find_status, persist
from packvit.corpus.inputs.roots import record_root
from packvit.corpus.inputs.sources import Input as Input
from packvit.corpus.inputs.tars import Beside, list_tar
from packvit.corpus.inputs.unpacking import is_packed
from packvit.corpus.inputs.zips import list_zip, member_url
from packvit.images.decode import ImageError, find_file

# Of the formats that images/ decodes; HEIC with an extra, without which each is a row that says so.
SUFFIXES = b".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split()
PHOTOGRAPHS = frozenset(SUFFIXES)
ARCHIVES = (b".tar", b".parquet", b".zip")
UNREAD = re.compile(rb"\.tar\.(z|lz|lz4|lzma|lzo|br|7z|rar)$", re.IGNORECASE)
# What comes with the photographs of a folder. Source: datasets 4, folder_based_builder.py.
METADATA = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")

MOST_DEPTH = 32  # nested pages of links


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder."""

    name: bytes
    path: bytes
    is_folder: bool
    is_linked_folder: bool = False


def list_inputs(
    paths: Sequence[str],
    lists: Sequence[str] = (),
    *,
    column: str = "path",
    image_column: str = "image",
    keep: Sequence[str] = (),
    known: str | None = None,
) -> Listing:
    """Return the photographs that `paths` and `lists` name; folders are walked recursively.

    A path is a folder, a file, a pattern, or a URL of one; a tar, zip or Parquet file stands for
    the photographs in it. The inputs of a single folder or archive are named by their path in it;
    of several, the name starts with the path as typed. Links to folders are followed only if they
    are named themselves, so there are no loops. `lists` are files of paths, each of one file; in a
    table, `column` holds paths, and `image_column` the bytes of images. `keep` names columns that
    come with the photographs. `known` is the digest of the inputs of a job that is resumed: a path
    that has disappeared since is then a row, not an error.

    Raises: UsageError if there are no inputs, if none of the named paths exists, if a pattern
    matches nothing, if two inputs have the same name, if a server cannot list a folder, or if a
    column to keep is nowhere;
    WriteError if the temporary file cannot be written.
    """
    with spooling():
        keeping = Keeping(tuple(keep))
        finder = Finder(Listing(), image_column, keeping)
        alone = len(paths) + len(lists) == 1
        for path in paths:
            finder.add_path(os.fsencode(path), alone=alone)
        for path in lists:
            for name, kept in read_list(path, column, keeping):
                finder.add_listed(name, kept)
        listing = finder.listing
        listing.root = record_root(paths, lists, image_column)
        if not len(listing):
            if finder.empty:
                raise no_photographs(finder.empty)
            raise UsageError(
                "No photographs were found in "
                f"{', '.join(map(spell, [*paths, *lists])) or 'nothing'}; {listing.ignored} other "
                f"files were passed over ({by_suffix(listing.passed_over)}). "
                "Photographs in a folder end in "
                f"{b' '.join(SUFFIXES).decode()}; name a file itself to take it whatever its "
                "suffix."
            )
        listing.sort()
        mistake = finder.find_mistake()
        if mistake and known != listing.sha256():
            raise mistake
        if known is None:
            keeping.check_met()
        listing.notes = keeping.notes()
    return listing


class Finder:
    """Adds the photographs that paths name to a listing."""

    def __init__(self, listing: Listing, image_column: str, keeping: Keeping) -> None:
        self.listing = listing
        self.image_column = image_column
        self.keeping = keeping
        self.protocols: set[tuple[str, ...]] = set()  # whose packages are known to be installed
        self.gone: list[bytes] = []  # paths as typed that do not exist
        self.silent: list[tuple[bytes, ImageError]] = []  # URLs whose server gave no answer
        self.unasked: list[bytes] = []  # URLs of files that were not looked up yet
        self.pages: dict[bytes, tuple[bytes, int, int]] = {}  # of the web: links, depth, repeats
        self.empty: list[tuple[bytes, int]] = []  # archives without photographs; their other files

    def add_path(self, typed: bytes, *, alone: bool) -> None:
        """Add all photographs that a path names; `alone` if it is the only path."""
        remote = is_url(os.fsdecode(typed))
        if remote:
            check_protocols(os.fsdecode(typed))
        # Of a chained URL, zip://photos::s3://bucket/x.zip, the first link has the path.
        first, joint, rest = typed.partition(b"::")
        head, chain = (first, joint + rest) if remote and b"://" in first else (typed, b"")
        if not remote and os.path.lexists(typed):
            base, pattern = typed, b""
        else:
            base, pattern = globs.split(head, globs.MAGIC_URL if remote else globs.MAGIC)
        if pattern:
            before, empty = len(self.listing), len(self.empty)
            try:
                self.add_pattern(base, pattern, chain, remote=remote)
            except ImageError as error:
                if error.code != "missing":
                    raise no_answer(typed, error) from error
            if len(self.listing) == before and len(self.empty) == empty:
                raise UsageError(
                    f"Nothing matches {shown(typed)}. ** stands for any number of folders, * "
                    "and ? stay within one; quote a pattern, so that the shell leaves it alone."
                )
            return
        try:
            folder = is_folder(typed, head, remote=remote)
        except ImageError as error:
            self.add_unread(typed, error)
            return
        if folder:
            prefix = b"" if alone else spell_bytes(head).rstrip(b"/") + b"/"
            try:
                self.walk(head if remote else typed, prefix, chain, remote=remote)
            except ImageError as error:
                raise no_answer(typed, error) from error
            return
        if not remote and is_other(typed) and looks_like_list(typed, alone=alone):
            raise UsageError(
                f"{shown(typed)} is a text, not a photograph. Did you mean --list {shown(typed)}, "
                "which embeds the paths in it?"
            )
        try:
            code = self.add_named(typed, alone=alone)
        except ImageError as error:
            self.add_unread(typed, error)
            return
        if code == "missing" and not os.path.lexists(typed):  # a broken link is there
            self.gone.append(typed)
        elif remote and code is None:
            self.unasked.append(typed)

    def add_unread(self, typed: bytes, error: ImageError) -> None:
        """Add an error row for a URL that cannot be read."""
        self.listing.add(spell_bytes(typed), typed, error.code)
        if error.code == "missing":
            self.gone.append(typed)
        else:
            self.silent.append((typed, error))

    def find_mistake(self) -> UsageError | None:
        """Return the error if none of the named paths exists, as when they are mistyped.

        A missing path next to existing ones may have just been deleted, and is a row.
        """
        gone = self.gone.copy()
        if len(gone) + len(self.silent) + len(self.unasked) < len(self.listing):
            return None
        for typed in self.unasked:
            try:
                find_kind(os.fsdecode(typed))
                return None
            except ImageError as error:
                if error.code != "missing":
                    return None
                gone.append(typed)
        if self.silent:
            return no_answer(*self.silent[0])
        return not_there(gone) if gone else None

    def add_pattern(self, base: bytes, pattern: bytes, chain: bytes, *, remote: bool) -> None:
        """Add the files under the folder `base` whose names match a pattern."""
        matched, most = globs.compile_pattern(pattern), globs.depth(pattern)
        start = base if remote else base or b"."
        if not remote and not os.path.isdir(start):
            return
        self.listing.push(start, base)
        for entry, name in self.entries(chain, remote=remote):
            inner = name[len(base) :]
            if entry.is_folder and (most is None or inner.count(b"/") < most):
                self.listing.push(entry.path, name + b"/")
            if matched.fullmatch(inner):
                if not entry.is_folder and not entry.is_linked_folder:
                    try:
                        self.add_named(name + chain, alone=False)
                    except ImageError as error:
                        path = name + chain
                        self.listing.add(spell_bytes(path), path, error.code)
                elif is_photograph(entry.name):
                    self.listing.add(spell_bytes(name), entry.path, "not_a_file")

    def walk(self, root: bytes, prefix: bytes, chain: bytes, *, remote: bool) -> None:
        """Add all photographs under the folder `root`; their names start with `prefix`."""
        before = len(self.listing)
        self.listing.push(root, prefix)
        for entry, name in self.entries(chain, remote=remote):
            if entry.is_folder:
                self.listing.push(entry.path, name + b"/")
            if is_photograph(entry.name):
                if remote:
                    code = "not_a_file" if entry.is_folder else None
                else:
                    code = find_obstacle(entry.path)
                self.listing.add(name, entry.path + chain, code)
            elif self.keeping and not entry.is_folder and entry.name in METADATA:
                self.add_metadata(entry, name, chain)
            elif not entry.is_folder:
                self.listing.pass_over(entry.name)
        self.listing.join_beside(before)

    def add_metadata(self, entry: Entry, name: bytes, chain: bytes) -> None:
        """Add what a file of metadata says of the photographs in its folder, and below.

        What lies deeper counts first, as in datasets.
        """
        above = name.removesuffix(entry.name)
        rank = METADATA.index(entry.name) - len(METADATA) * above.count(b"/")
        path = os.fsdecode(entry.path + chain)
        try:
            for below, kept in read_list(path, "file_name", self.keeping):
                if kept:
                    self.listing.add_beside(above + os.path.normpath(below), kept, rank)
        except UsageError:
            self.keeping.fail(spell(path))

    def entries(self, chain: bytes, *, remote: bool) -> Iterator[tuple[Entry, bytes]]:
        """Yield the entries of all pending folders, with their names.

        A folder that cannot be read becomes an error row, since photographs may be missing.

        Raises: ImageError if the first folder is remote and cannot be read.
        """
        first = True
        web = remote and not chain
        while found := self.listing.pop():
            folder, prefix = found
            try:
                entries = read_url_folder(folder, chain) if remote else read_folder(folder)
                if web and folder.startswith((b"http://", b"https://")):
                    entries = self.read_page(folder, list(entries), first=first)
                for entry in entries:
                    yield entry, prefix + entry.name
            except (OSError, ImageError):
                if first and remote:
                    raise
                name = prefix.rstrip(b"/") or folder
                if not is_photograph(name):  # with such a suffix it is a row already
                    self.listing.add(spell_bytes(name), folder + chain, "unreadable")
            first = False

    def read_page(self, folder: bytes, entries: list[Entry], *, first: bool) -> list[Entry]:
        """Return the links of a page, unless it repeats the page above it.

        A page that links to itself under a new address at each level would be walked without end;
        such a page has the same links as the page above it.

        Raises: ImageError unreadable for such a page, or one too deep.
        """
        links = hashlib.sha256(b"\0".join(sorted(entry.name for entry in entries)))
        above, depth, repeats = None, 0, 0
        if not first:
            parent = folder.rstrip(b"/").rpartition(b"/")[0]
            above, depth, repeats = self.pages.get(parent, (None, 0, 0))
        repeats = repeats + 1 if above == links.digest() else 0
        again = repeats > 0 and not all(entry.is_folder for entry in entries)
        if again or repeats > 1 or depth >= MOST_DEPTH:
            raise ImageError("unreadable", "list")
        if any(entry.is_folder for entry in entries):
            self.pages[folder.rstrip(b"/")] = (links.digest(), depth + 1, repeats)
        return entries

    def add_named(self, path: bytes, *, alone: bool) -> str | None:
        """Add a named file: the photographs in it if it is an archive, else the file itself.

        Returns the error code if all of it is known to be unreadable.

        Raises: ImageError missing or unreadable for a URL of an archive that lists nothing.
        """
        name = os.fsencode(bare(os.fsdecode(path)))
        if UNREAD.search(name):
            raise UsageError(
                f"{shown(path)} is compressed in a way that is not read: gzip, bzip2, xz and zstd "
                "are. Decompress it to a .tar, which is about as large."
            )
        suffix = suffix_of(name)
        remote = is_url(os.fsdecode(path))
        if suffix not in ARCHIVES or not (remote or find_obstacle(path) is None):
            return self.add_file(path)
        if suffix == b".zip" and b"::" in path:  # zip://a.zip::b.zip, a file in a file
            return self.add_file(path)
        prefix = b"" if alone else spell_bytes(path) + b"/"
        before, ignored, distinct = len(self.listing), self.listing.ignored, True
        try:
            source = os.fsdecode(path)
            if suffix == b".zip":
                self.add_zip(path, prefix)
                found = ()
            elif suffix == b".tar":
                found = list_tar(source, PHOTOGRAPHS, self.keeping)
            else:
                found = list_parquet(source, self.image_column, self.keeping)
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

    def add_zip(self, path: bytes, prefix: bytes) -> None:
        """Add the photographs in a zip.

        Raises: ImageError truncated if it is damaged, or what opening it raises.
        """
        for item in list_zip(os.fsdecode(path), PHOTOGRAPHS):
            if isinstance(item, bytes):
                self.listing.pass_over(item)
            else:
                name, code = item
                url, name = member_url(name, path), prefix + name
                self.listing.add(name, url, code, whole=name, repeats=True)

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


def shown(path: bytes) -> str:
    """Return a path for messages."""
    return readable(spell_bytes(path))


def not_there(paths: list[bytes]) -> UsageError:
    """Return the error for paths that do not exist."""
    named = ", ".join(f'"{shown(path)}"' for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return UsageError(
        f"{named}{more} {'is' if len(paths) == 1 else 'are'} not there. Check the spelling; "
        "nothing was written."
    )


def no_photographs(empty: list[tuple[bytes, int]]) -> UsageError:
    """Return the error for archives without photographs, if there are no other inputs."""
    named = ", ".join(shown(path) for path, _ in empty[:3])
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return UsageError(
        f"{named}{more} {'holds' if len(empty) == 1 else 'hold'} no photographs, but "
        f"{sum(others for _, others in empty)} other files. Photographs in an archive end in "
        f"{b' '.join(SUFFIXES).decode()}."
    )


def no_answer(path: bytes, error: ImageError) -> UsageError:
    """Return the error for a URL whose server gives no answer; `error` has the causes."""
    cause: BaseException = error
    while cause.__cause__ and find_status(cause) is None:
        cause = cause.__cause__
    status = find_status(cause)
    what = type(cause).__name__ + (f" {status}" if status else "")
    return UsageError(
        f'"{shown(path)}" cannot be read ({what}). Check the address, '
        "the credentials that its server asks for, and whether the server answers; nothing was "
        "written."
    )


def is_photograph(name: bytes) -> bool:
    """Return whether a name has the suffix of a photograph."""
    return os.path.splitext(name)[1].lower() in PHOTOGRAPHS


def suffix_of(name: bytes) -> bytes:
    """Return the suffix of a name in lower case; that of a compressed tar is a tar's."""
    return b".tar" if is_packed(os.fsdecode(name)) else os.path.splitext(name)[1].lower()


def is_other(name: bytes) -> bool:
    """Return whether a local file has no suffix of a photograph or an archive."""
    archive = suffix_of(name) in ARCHIVES
    return not (is_photograph(name) or archive) and os.path.isfile(name)


def is_folder(typed: bytes, head: bytes, *, remote: bool) -> bool:
    """Return whether a path is a folder; a URL with a file's suffix is not looked up.

    Raises: ImageError if its server does not answer.
    """
    if not remote:
        return os.path.isdir(typed)
    head = os.fsencode(bare(os.fsdecode(head)))
    if is_photograph(head) or suffix_of(head) in ARCHIVES:
        return False
    return find_kind(os.fsdecode(typed)) == "folder"


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


def find_obstacle(path: bytes) -> str | None:
    """Return the error code if `path` is not a readable regular file, or None.

    Checked before a file is opened, since opening a pipe waits for a writer.
    """
    try:
        find_file(os.fsdecode(path), "list")
    except ImageError as error:
        return error.code
    return None
