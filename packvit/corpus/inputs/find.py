"""Which photographs a job embeds, what each is called, and in which order. No torch.

Nothing vanishes: what carries the suffix of a photograph and is not a regular file is an input
too, one whose error is known before anything is read; what carries another suffix is counted.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packvit.corpus import WrongUse
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
from packvit.corpus.inputs.listing import Listing, by_suffix, readable, spooling
from packvit.corpus.inputs.lists import read_list
from packvit.corpus.inputs.sources import Input as Input
from packvit.corpus.inputs.sources import find_kind, find_status, find_url, unreadable
from packvit.corpus.inputs.tars import list_tar
from packvit.images.decode import ImageError, find_file

# Of the formats that images/ decodes; HEIC with an extra, without which each is a row that says so.
SUFFIXES = b".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split()
PHOTOGRAPHS = frozenset(SUFFIXES)
COMPRESSED = re.compile(rb"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)

MOST_DEPTH = 32  # pages of links that lie under one another


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies in a folder."""

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
    known: str | None = None,
) -> Listing:
    """Return the photographs that `paths` and `lists` name, folders being walked to their ends.

    A path is a folder, a file, a pattern, or a URL of one; a tar or Parquet file stands for the
    photographs in it. A single folder's or archive's inputs are called by their path under it.
    Several are told apart by the path as typed, which then begins the name. Links to folders are
    entered only where they are named themselves, so no loop can be walked. `lists` are files of
    paths, of one file each; `column` holds them in a table, and `image_column` the bytes of images.
    `known` is the digest of a job's inputs that goes on: what has gone since then is a row of it.

    Raises: WrongUse if there are no inputs, of which none of all that was named being there is a
    case, if a pattern matches nothing, if two inputs have the same name, or if a server breaks off
    its listing; WriteError if there is no room to sort them.
    """
    with spooling():
        finder = Finder(Listing(), image_column)
        alone = len(paths) + len(lists) == 1
        for path in paths:
            finder.add_path(os.fsencode(path), alone=alone)
        for path in lists:
            for name in read_list(path, column):
                finder.add_listed(name)
        listing = finder.listing
        if not len(listing):
            if finder.empty:
                raise no_photographs(finder.empty)
            raise WrongUse(
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
    return listing


class Finder:
    """Adds what paths stand for to a listing."""

    def __init__(self, listing: Listing, image_column: str) -> None:
        self.listing = listing
        self.image_column = image_column
        self.protocols: set[tuple[str, ...]] = set()  # that are known to have what reads them
        self.gone: list[bytes] = []  # paths as typed that lead nowhere
        self.silent: list[tuple[bytes, ImageError]] = []  # URLs of which nobody says what they name
        self.unasked: list[bytes] = []  # URLs of files that nobody was asked for yet
        self.pages: dict[bytes, tuple[bytes, int, int]] = {}  # of the web: links, depth, repeats
        self.empty: list[tuple[bytes, int]] = []  # archives without photographs; their other files

    def add_path(self, typed: bytes, *, alone: bool) -> None:
        """Add all that a path stands for, which is the only one if it is `alone`."""
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
                raise WrongUse(
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
        """Add the row of a URL that names nothing which can be read."""
        self.listing.add(spell_bytes(typed), typed, error.code)
        if error.code == "missing":
            self.gone.append(typed)
        else:
            self.silent.append((typed, error))

    def find_mistake(self) -> WrongUse | None:
        """Return the answer to paths of which none leads anywhere: they were mistyped.

        One that leads nowhere beside others that do may have vanished just now, and is a row.
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
        """Add the files under the folder `base` whose names match, as if each had been named."""
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
        """Add all photographs under the folder `root`, their names opening with `prefix`."""
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
            elif not entry.is_folder:
                self.listing.pass_over(entry.name)

    def entries(self, chain: bytes, *, remote: bool) -> Iterator[tuple[Entry, bytes]]:
        """Yield what lies in all folders that the listing remembers, with its name.

        A folder that can't be read becomes the row that says photographs may be missing.

        Raises: ImageError if it is the first, and remote: its server may just not answer.
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
        """Return what a page links to, unless it is one that was read before, under another name.

        A page that links to itself has an address for each level, and as many pages as one asks
        for: it has the links of the page above it.

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
        """Add what a named file stands for: an archive's photographs, or itself.

        Return the code of what keeps all of it from being read, if that is known.

        Raises: ImageError missing or unreadable for a URL's archive of which nothing is listed.
        """
        name = os.fsencode(bare(os.fsdecode(path)))
        if COMPRESSED.search(name):
            raise WrongUse(
                f"{shown(path)} is compressed, so that its members cannot be read where they "
                "lie. Unpack it to a .tar, which takes no more room: photographs do not shrink."
            )
        suffix = os.path.splitext(name)[1].lower()
        remote = is_url(os.fsdecode(path))
        if suffix not in (b".tar", b".parquet") or not (remote or find_obstacle(path) is None):
            return self.add_file(path)
        prefix = b"" if alone else spell_bytes(path) + b"/"
        before, ignored, distinct = len(self.listing), self.listing.ignored, True
        try:
            source = os.fsdecode(path)
            if suffix == b".tar":
                found = list_tar(source, PHOTOGRAPHS)
            else:
                found = list_parquet(source, self.image_column)
            for item in found:
                if isinstance(item, bytes):
                    self.listing.pass_over(item)
                elif item is not None:
                    short, whole, within, code = item
                    whole = prefix + whole
                    self.listing.add(prefix + short, path, code, within, whole=whole)
                else:
                    distinct = False
        except ImageError as error:
            if remote and len(self.listing) == before and error.code in ("missing", "unreadable"):
                raise
            # Its own row says that photographs may be missing.
            self.listing.settle(before, distinct=distinct)
            self.listing.add(spell_bytes(path), path, error.code)
            return error.code
        if len(self.listing) == before:
            self.empty.append((path, self.listing.ignored - ignored))
        self.listing.settle(before, distinct=distinct)
        return None

    def add_file(self, path: bytes) -> str | None:
        """Add one file, which is read as a photograph whatever its suffix.

        Return the code of what keeps it from being read, if that is known.
        """
        code = None
        text = os.fsdecode(path)
        if is_url(text):
            check_protocols(text)
            named = tuple(protocols(text))
            if named not in self.protocols:  # what is not installed is said at once
                try:
                    with unreadable():
                        find_url(text)
                except ImageError:
                    pass  # reading it says so again, in its row
                self.protocols.add(named)
        else:
            code = find_obstacle(path)
        self.listing.add(spell_bytes(path), path, code)
        return code

    def add_listed(self, path: bytes) -> None:
        """Add a path of a list; one that may not be reached is a row, which says so when read."""
        try:
            self.add_file(path)
        except WrongUse:
            self.listing.add(spell_bytes(path), path, None)


def shown(path: bytes) -> str:
    """Return a path as a message has it."""
    return readable(spell_bytes(path))


def not_there(paths: list[bytes]) -> WrongUse:
    """Return the answer to paths that lead nowhere."""
    named = ", ".join(f'"{shown(path)}"' for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return WrongUse(
        f"{named}{more} {'is' if len(paths) == 1 else 'are'} not there. Check the spelling; "
        "nothing was written."
    )


def no_photographs(empty: list[tuple[bytes, int]]) -> WrongUse:
    """Return the answer to archives that hold no photographs, and nothing beside them does."""
    named = ", ".join(shown(path) for path, _ in empty[:3])
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return WrongUse(
        f"{named}{more} {'holds' if len(empty) == 1 else 'hold'} no photographs, but "
        f"{sum(others for _, others in empty)} other files. Photographs in an archive end in "
        f"{b' '.join(SUFFIXES).decode()}."
    )


def no_answer(path: bytes, error: ImageError) -> WrongUse:
    """Return the answer to a URL of which nobody says what it names; `error` has the causes."""
    cause: BaseException = error
    while cause.__cause__ and find_status(cause) is None:
        cause = cause.__cause__
    status = find_status(cause)
    what = type(cause).__name__ + (f" {status}" if status else "")
    return WrongUse(
        f'"{shown(path)}" cannot be read ({what}). Check the address, '
        "the credentials that its server asks for, and whether the server answers; nothing was "
        "written."
    )


def is_photograph(name: bytes) -> bool:
    """Tell whether a name ends as a photograph's does."""
    return os.path.splitext(name)[1].lower() in PHOTOGRAPHS


def is_folder(typed: bytes, head: bytes, *, remote: bool) -> bool:
    """Tell whether a path is a folder; of a URL, only where its name does not already say not.

    Raises: ImageError if its server does not tell.
    """
    if not remote:
        return os.path.isdir(typed)
    head = os.fsencode(bare(os.fsdecode(head)))
    if is_photograph(head) or os.path.splitext(head)[1].lower() in (b".tar", b".parquet"):
        return False
    return find_kind(os.fsdecode(typed)) == "folder"


def read_folder(folder: bytes) -> Iterator[Entry]:
    """Yield what lies in `folder`, in the file system's order, and close it in any case."""
    with os.scandir(folder) as entries:
        for entry in entries:
            inside = entry.is_dir(follow_symlinks=False)
            linked = not inside and entry.is_symlink() and os.path.isdir(entry.path)
            yield Entry(entry.name, entry.path, inside, linked)


def read_url_folder(folder: bytes, chain: bytes) -> Iterator[Entry]:
    """Yield what lies in a folder behind a URL, whose last links are `chain`."""
    with unreadable():
        files, place = find_url(os.fsdecode(folder + chain))
        found = files.ls(place, detail=True)
    for item in found:
        name = os.fsencode(item["name"].rstrip("/").rpartition("/")[2])
        itself = item["name"].rstrip("/") == place.rstrip("/") or name in (b".", b"..")
        if not itself:  # some list a folder in itself, and would so for ever
            path = folder.rstrip(b"/") + b"/" + name
            if folder.endswith(b"://"):
                path = folder + name
            yield Entry(name, path, item["type"] == "directory")


def find_obstacle(path: bytes) -> str | None:
    """Return the code of what keeps `path` from being read as a regular file, or None.

    Asked before anything is opened, since opening a pipe waits for a writer that may never come.
    """
    try:
        find_file(os.fsdecode(path), "list")
    except ImageError as error:
        return error.code
    return None
