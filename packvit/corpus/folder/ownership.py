"""Which files of a folder packvit wrote, and whether a job may write there. No torch."""

import os

from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_manifest, writing
from packvit.corpus.folder.names import (
    COMMITS,
    CURRENT,
    DATA,
    EXPORTS,
    FIRST,
    KNOWN,
    LEASE,
    LOCK,
    MARK,
    MTIMES,
    PENDING,
    SPOOL,
    TEMPORARY,
    names_of,
    part_number,
)
from packvit.corpus.folder.objects import is_commit
from packvit.corpus.folder.opening import MOST_MANIFEST, read_own
from packvit.corpus.folder.stores import Folder, StorePath

BESIDE_FEATURES = (LOCK, MARK, LEASE)
BEFORE_MANIFEST = (PENDING, MTIMES)  # what a job writes first, beside its certificate


def is_ours(folder: Folder) -> bool:
    """Return whether packvit wrote the manifest in `folder`, even if it was damaged since."""
    try:
        data = read_own(folder / names_of(folder).manifest, MOST_MANIFEST)
        return b'"packvit features ' in data
    except OSError:
        return False


def own_files(folder: Folder) -> tuple[str, ...]:
    """Return the files in `folder` that have names of ours, except the lock; manifests last."""
    files = {name for below in ("", DATA, EXPORTS, COMMITS) for name in files_in(folder, below)}
    parts = sorted(name for name in files if part_number(name) is not None or is_commit(name))
    fixed = (name for names in (FIRST, CURRENT) for name in names.fixed if name in files)
    named = dict.fromkeys(fixed)  # both formats have some names
    return (*left_over(folder), *parts, *sorted(named, key=is_manifest))


def is_manifest(name: str) -> bool:
    """Return whether this is the manifest of any format."""
    return name in (FIRST.manifest, CURRENT.manifest)


def files_in(folder: Folder, below: str) -> list[str]:
    """Return the paths of the files in `folder / below`, none if that is a link or not a folder."""
    if isinstance(folder, StorePath):
        return [below + path.name for path in (folder / below if below else folder).iterdir()]
    if below and ((folder / below).is_symlink() or not (folder / below).is_dir()):
        return []
    with os.scandir(folder / below) as entries:
        return [below + e.name for e in entries if e.is_file(follow_symlinks=False)]


def left_over(folder: Folder) -> tuple[str, ...]:
    """Return the temporary files that a killed job left in `folder`."""
    ours = {SPOOL, KNOWN, *(os.path.basename(n) for names in (FIRST, CURRENT) for n in names.fixed)}
    found = [(path.name, TEMPORARY.fullmatch(path.name)) for path in folder.iterdir()]
    return tuple(
        sorted(
            name
            for name, parsed in found
            if parsed and (parsed[1] in ours or part_number(parsed[1]) is not None)
        )
    )


def remove_left_over(folder: Folder) -> None:
    """Remove the temporary files of workers that were stopped."""
    for name in left_over(folder):
        (folder / name).unlink(missing_ok=True)


def check_usable(folder: Folder, *, overwrite: bool = False) -> None:
    """Refuse a folder that is neither empty nor holds a job's features.

    Raises: UsageError saying what it holds.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder. Choose another one for the features.")
    with writing(folder):
        held = sorted(set(list_all(folder)) - {*BESIDE_FEATURES, *left_over(folder)})
        foreign = find_foreign(folder)
    if set(held) <= {*BEFORE_MANIFEST, names_of(folder).certificate}:
        return  # nothing, or what a job had written that was killed at its very start
    if not is_ours(folder):
        raise UsageError(
            f"{folder} is not empty: it holds {held[0]} and {len(held) - 1} other files, and no "
            f"{CURRENT.manifest} of packvit. Choose a new or an empty folder."
        )
    if overwrite and foreign:
        raise UsageError(
            f"{folder} is not started over: it holds {foreign[0]} and {len(foreign) - 1} other "
            "files that packvit did not write. Move them away, or choose another folder."
        )
    if not overwrite and read_manifest(folder) is None:
        raise UsageError(
            f"{folder / names_of(folder).manifest} is damaged, so this job cannot be compared with "
            "the one that the folder holds. Restore a copy of it, start over with `overwrite`, or "
            "choose another folder."
        )


def find_foreign(folder: Folder) -> list[str]:
    """Return the files in a folder that packvit did not write."""
    ours = {*BESIDE_FEATURES, *left_over(folder), *own_files(folder)}
    return sorted(set(list_all(folder)) - ours)


def list_all(folder: Folder) -> list[str]:
    """Return everything in `folder`, and instead of our folders in it what they hold."""
    found = []
    for path in folder.iterdir():
        below = f"{path.name}/"
        if below in (DATA, EXPORTS, COMMITS) and path.is_dir() and not path.is_symlink():
            found += [below + each.name for each in path.iterdir()]
        else:
            found.append(path.name)
    return found
