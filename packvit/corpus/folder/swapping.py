"""Make a feature folder anew beside the old one, and swap the two in one step. No torch.

    .NAME.update     the new folder while it is made; afterwards the old one, until it is removed
    .NAME.replaced   the old folder, where the file system cannot exchange two

The new folder holds a mark until it is in place, so the two are told apart after a kill: the folder
itself is always the old one or the new. Where they cannot be exchanged, it is missing between two
renames, and the next command finishes the second.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packvit.atomic import rename_flushed, sync
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import claim, read_manifest, writing
from packvit.corpus.folder.names import DATA, EXPORTS, LOCK, MARK
from packvit.corpus.folder.ownership import find_foreign, own_files
from packvit.corpus.folder.stores import Folder, StorePath

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, fcntl.h and fs.h
# Why a folder is not removed: it is missing, it is not a folder, or it holds files of others.
FOREIGN = (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY)
CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def new_of(folder: Path) -> Path:
    """Return where the new folder is made."""
    return folder.with_name(f".{folder.name}.update")


def old_of(folder: Path) -> Path:
    """Return where the old folder waits for its removal if the two cannot be exchanged."""
    return folder.with_name(f".{folder.name}.replaced")


@contextmanager
def updating(folder: Path) -> Iterator[Path]:
    """Yield the new folder, empty or half made, and then put it in the place of `folder`.

    Raises: UsageError if another job writes to it, or if it holds files that are not ours;
    WriteError.
    """
    if is_finished(new_of(folder)):  # a kill came before it was swapped in
        with claim(folder):
            if is_finished(new_of(folder)):  # still: another command may have swapped it in
                with claim(new_of(folder)):
                    put_in_place(folder)
    with claim(folder):
        clean(folder)
        if foreign := find_foreign(folder):
            raise UsageError(
                f"{folder} is not updated: it holds {foreign[0]} and {len(foreign) - 1} other "
                "files that packvit did not write. Move them away first."
            )
        target = new_of(folder)
        with writing(target):
            if not target.exists():
                target.mkdir()
                (target / MARK).touch()
                sync(target)
            if read_manifest(target) is None:  # of a job killed at its very start
                remove_own(target)
        with claim(target):
            try:
                yield target
            finally:
                if not own_files(target):  # nothing was begun
                    with suppress(OSError):
                        for name in (LOCK, MARK):
                            (target / name).unlink(missing_ok=True)
                        target.rmdir()
            put_in_place(folder)


def is_finished(folder: Path) -> bool:
    """Return whether a folder is made, and was to replace another."""
    return (folder / MARK).is_file() and (read_manifest(folder) or {}).get("complete") is True


def put_in_place(folder: Path) -> None:
    """Swap the two folders, both of which are claimed, and remove the old one.

    Raises: WriteError.
    """
    with writing(folder):
        swap(folder)
    clean(folder)


def swap(folder: Path) -> None:
    """Put the new folder in the place of the old one.

    Raises: OSError.
    """
    new, old = new_of(folder), old_of(folder)
    sync(new)
    if not exchange(new, folder):
        rename_flushed(folder, old)
        with suppress(FileNotFoundError):  # another command has restored it
            rename_flushed(new, folder)
    sync(folder.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False if this system or this disk cannot.

    Raises: OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if not libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(second))


def restore(folder: Folder) -> None:
    """Rename the new folder if a kill has left none in its place; or else the old one.

    Raises: WriteError.
    """
    if isinstance(folder, StorePath):
        return  # which has no updates
    new, old = new_of(folder), old_of(folder)
    if os.path.lexists(folder) or not old.is_dir():
        return
    with writing(folder), suppress(FileNotFoundError):  # another command has done so
        rename_flushed(new if is_finished(new) else old, folder)


def clean(folder: Folder) -> None:
    """Remove what a finished update leaves beside a folder, and the mark in it.

    Raises: UsageError if something else has the name of ours; WriteError.
    """
    if isinstance(folder, StorePath):
        return
    new, old = new_of(folder), old_of(folder)
    for path in (old, new):
        if path.is_dir() and not path.is_symlink() and not (path / MARK).is_file():
            with writing(path):
                remove_own(path)
                (path / LOCK).unlink(missing_ok=True)
                try:
                    path.rmdir()
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                    raise UsageError(
                        f"{path} is in the way of an update, and holds files that packvit did not "
                        "write. Move it away first."
                    ) from error
    with writing(folder / MARK):
        (folder / MARK).unlink(missing_ok=True)


def remove_own(folder: Path) -> None:
    """Remove the files and folders of ours, except the lock and the mark.

    Raises: OSError.
    """
    for name in own_files(folder):
        (folder / name).unlink(missing_ok=True)
    for name in (DATA, EXPORTS):
        try:
            (folder / name).rmdir()
        except OSError as error:
            if error.errno not in FOREIGN:
                raise
