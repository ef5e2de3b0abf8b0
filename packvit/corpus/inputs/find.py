"""Find the photographs that a job embeds, name them, and sort them. No torch.

Every file is accounted for: a path with the suffix of a photograph that is not a regular file is an
input with an error, and files with other suffixes are counted.
"""

import os
from collections.abc import Sequence

from packvit.corpus import UsageError
from packvit.corpus.inputs import patterns as globs
from packvit.corpus.inputs.addresses import bare, check_protocols, is_url, spell, spell_bytes
from packvit.corpus.inputs.beside import SUFFIXES as BESIDE
from packvit.corpus.inputs.beside import read_beside
from packvit.corpus.inputs.kept import Keeping
from packvit.corpus.inputs.listing import Listing, by_suffix, spooling
from packvit.corpus.inputs.lists import looks_like_list, read_list
from packvit.corpus.inputs.mistakes import no_answer, no_photographs, not_there, shown
from packvit.corpus.inputs.named_files import NamedFiles, find_obstacle
from packvit.corpus.inputs.reader import find_kind
from packvit.corpus.inputs.roots import record_root
from packvit.corpus.inputs.suffixes import METADATA, SUFFIXES, is_archive, is_other, is_photograph
from packvit.corpus.inputs.walking import Entry, walk
from packvit.images.errors import ImageError

NEAREST = -(1 << 30)  # the rank of values beside a photograph, before those of any metadata


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
            for number, (name, kept) in enumerate(read_list(path, column, keeping), 1):
                if name:
                    finder.named.add_listed(name, kept)
                else:  # in a row of a table
                    row = spell_bytes(os.fsencode(path)) + b"/%d" % number
                    finder.listing.add(row, row, "missing", repeats=True, kept=kept)
        listing = finder.listing
        listing.root = record_root(paths, lists, image_column)
        if not len(listing):
            if finder.named.empty:
                raise no_photographs(finder.named.empty)
            raise UsageError(
                "No photographs were found in "
                f"{', '.join(map(spell, [*paths, *lists])) or 'nothing'}; "
                f"files passed over: {by_suffix(listing.passed_over)}. "
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
        self.keeping = keeping
        self.named = NamedFiles(listing, image_column, keeping)
        self.gone: list[bytes] = []  # paths as typed that do not exist
        self.silent: list[tuple[bytes, ImageError]] = []  # URLs whose server gave no answer
        self.unasked: list[bytes] = []  # URLs of files that were not looked up yet

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
            before, empty = len(self.listing), len(self.named.empty)
            try:
                self.add_pattern(base, pattern, chain, remote=remote)
            except ImageError as error:
                if error.code != "missing":
                    raise no_answer(typed, error) from error
            if len(self.listing) == before and len(self.named.empty) == empty:
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
                self.add_folder(head if remote else typed, prefix, chain, remote=remote)
            except ImageError as error:
                raise no_answer(typed, error) from error
            return
        if not remote and is_other(typed) and looks_like_list(typed, alone=alone):
            raise UsageError(
                f"{shown(typed)} is a text, not a photograph. Did you mean --list {shown(typed)}, "
                "which embeds the paths in it?"
            )
        try:
            code = self.named.add(typed, alone=alone)
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
        for entry, name in walk(self.listing, chain, remote=remote):
            inner = name[len(base) :]
            if entry.is_folder and (most is None or inner.count(b"/") < most):
                self.listing.push(entry.path, name + b"/")
            if matched.fullmatch(inner):
                if not entry.is_folder and not entry.is_linked_folder:
                    try:
                        self.named.add(name + chain, alone=False)
                    except ImageError as error:
                        path = name + chain
                        self.listing.add(spell_bytes(path), path, error.code)
                elif is_photograph(entry.name):
                    self.listing.add(spell_bytes(name), entry.path, "not_a_file")

    def add_folder(self, root: bytes, prefix: bytes, chain: bytes, *, remote: bool) -> None:
        """Add all photographs under the folder `root`; their names start with `prefix`."""
        before = len(self.listing)
        self.listing.push(root, prefix)
        for entry, name in walk(self.listing, chain, remote=remote):
            if entry.is_folder:
                self.listing.push(entry.path, name + b"/")
            if is_photograph(entry.name):
                if remote:
                    code = "not_a_file" if entry.is_folder else None
                else:
                    code = find_obstacle(entry.path)
                self.listing.add(name, entry.path + chain, code)
                if not remote and (kept := read_beside(entry.path, self.keeping)):
                    self.listing.add_beside(name, kept, NEAREST)
            elif self.keeping and not entry.is_folder and entry.name in METADATA:
                self.add_metadata(entry, name, chain)
            elif self.keeping and not remote and entry.name.endswith(BESIDE):
                pass  # read with its photograph
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
                if not below:
                    self.keeping.fail(spell(path))
                elif kept:
                    self.listing.add_beside(above + os.path.normpath(below), kept, rank)
        except UsageError:
            self.keeping.fail(spell(path))


def is_folder(typed: bytes, head: bytes, *, remote: bool) -> bool:
    """Return whether a path is a folder; a URL with a file's suffix is not looked up.

    Raises: ImageError if its server does not answer.
    """
    if not remote:
        return os.path.isdir(typed)
    text = bare(os.fsdecode(head))
    if is_photograph(os.fsencode(text)) or is_archive(text):
        return False
    return find_kind(os.fsdecode(typed)) == "folder"
