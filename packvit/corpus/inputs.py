"""Which files a job embeds, what each is called, and in which order. No torch.

Nothing vanishes: what carries the suffix of a photograph and is not a regular file is an input
too, one whose error is known before anything is read; what carries another suffix is counted.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from packvit.corpus import WrongUse

# Of the seven formats that images.py decodes.
SUFFIXES = (b".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif").split()


@dataclass(frozen=True, slots=True)
class Input:
    """One input: what its row is called, where it lies, and what listing it already found out."""

    id: str  # always valid UTF-8
    path: str  # as the file system spells it: bytes that are not UTF-8 are surrogates
    error: tuple[str, str] | None = None  # (code, stage) of an input that can't be read


@dataclass(frozen=True, slots=True)
class Listing:
    """All inputs of a job, sorted by the bytes of their names, and how many files are not."""

    inputs: tuple[Input, ...]
    ignored: int

    def sha256(self) -> str:
        """Return a digest of the inputs' names and order, which fix the parts and their packs."""
        digest = hashlib.sha256()
        for source in self.inputs:
            digest.update(source.id.encode() + b"\0")  # no file name holds a NUL
        return digest.hexdigest()


@dataclass(slots=True)
class Walk:
    """What is found while folders are read: `names` are ids in bytes, `ignored` counts files."""

    found: list[tuple[bytes, bytes, str | None]] = field(default_factory=list)  # name, path, code
    ignored: int = 0


def list_inputs(paths: Sequence[str]) -> Listing:
    """Return the photographs that `paths` name, folders being walked to their ends.

    A single folder's inputs are called by their path under it. Several paths are told apart by
    the path as typed, which then begins the name. Links to folders are entered only where they
    are named themselves, so no loop can be walked.

    Raises: WrongUse if there are no inputs, or if two have the same name.
    """
    walk = Walk()
    for path in paths:
        typed = os.fsencode(path)
        root = typed.rstrip(b"/")
        if os.path.isdir(typed):
            walk_folder(walk, typed, b"" if len(paths) == 1 else root + b"/")
        else:  # named by hand: an input, whatever its suffix
            walk.found.append((typed, typed, find_obstacle(typed)))
    if not walk.found:
        raise WrongUse(
            f"No photographs were found in {', '.join(paths) or 'nothing'}; {walk.ignored} other "
            "files were passed over. Photographs in a folder end in "
            f"{b' '.join(SUFFIXES).decode()}; name a file itself to take it whatever its suffix."
        )
    walk.found.sort(key=lambda entry: entry[0])
    inputs = tuple(
        Input(readable(name), os.fsdecode(path), (code, "list") if code else None)
        for name, path, code in walk.found
    )
    check_ids(inputs)
    return Listing(inputs, walk.ignored)


def walk_folder(walk: Walk, root: bytes, prefix: bytes) -> None:
    """Add all inputs under the folder `root` to `walk`, their names opening with `prefix`."""
    folders = [(root, prefix)]
    while folders:
        folder, prefix = folders.pop()
        try:
            for entry in read_folder(folder):
                name = prefix + entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder:
                    folders.append((entry.path, name + b"/"))
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    walk.found.append((name, entry.path, find_obstacle(entry.path)))
                elif not is_folder:
                    walk.ignored += 1
        except OSError:  # the folder itself becomes the row that says photographs may be missing
            name = prefix.rstrip(b"/") or root
            if os.path.splitext(name)[1].lower() not in SUFFIXES:  # with one, it is a row already
                walk.found.append((name, folder, "unreadable"))


def read_folder(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    """Yield what lies in `folder`, in the file system's order, and close it in any case."""
    with os.scandir(folder) as entries:
        yield from entries


def find_obstacle(path: bytes) -> str | None:
    """Return the code of what keeps `path` from being read as a regular file, or None.

    Asked before anything is opened, since opening a pipe waits for a writer that may never come.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:  # a link that leads to itself has nothing at its end
        return "missing" if error.errno == errno.ELOOP else "unreadable"
    return None if stat.S_ISREG(mode) else "not_a_file"


def readable(name: bytes) -> str:
    r"""Return `name` as text: Arrow takes UTF-8 alone, so that other bytes are written \xNN."""
    return name.decode("utf-8", "backslashreplace")


def check_ids(inputs: tuple[Input, ...]) -> None:
    """Raise WrongUse, naming one, if two inputs would be rows of the same id."""
    # Inputs are sorted by bytes, and only escaping can make neighbours of others: sort again.
    for left, right in pairwise(sorted(source.id for source in inputs)):
        if left == right:
            raise WrongUse(
                f'Two inputs are called "{left}". Name each path once, and no file that lies in a '
                "folder you name too."
            )
