"""One way to write a file whole: its name stands for what was there before, or for all of the new.

The disk has the contents before they take the name, and the name before the writer goes on, so
neither a full disk nor a power cut leaves half a file under it. No torch.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

# What some mounts of FUSE and SMB answer to the fsync of a folder, which they do not have.
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def replacing(*targets: Path, beside: Path | None = None) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each target; what is written there takes the targets' places.

    They stand beside the targets, or in the folder `beside` of the same disk.

    All of them are on the disk before the first takes its name. They do so one after the other, in
    the order given: what is killed between two leaves new files beside old ones. After an error the
    targets that have not been replaced are as they were, and no temporary file is left.

    Raises: OSError if the disk does not take them.
    """
    attempt = token_hex(4)
    temporaries = tuple(
        (beside or path.parent) / temporary_name(path.name, attempt) for path in targets
    )
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        for folder in dict.fromkeys(target.parent for target in targets):
            sync(folder)
    finally:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: Any) -> None:
    """Put `data`, bytes or another buffer, at `path`.

    Raises: OSError if the disk does not take it.
    """
    with replacing(path) as (temporary,):
        temporary.write_bytes(data)


def write_flushed(path: Path, data: Any) -> None:
    """Write a file that takes its name later, by `rename_flushed`; leave nothing if that fails.

    Raises: OSError if the disk does not take it.
    """
    try:
        path.write_bytes(data)
        sync(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def rename_flushed(temporary: Path, path: Path) -> None:
    """Give what is on the disk already its name.

    Raises: OSError.
    """
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def temporary_name(name: str, attempt: str = "") -> str:
    """Return what the file called `name` is called while it is written, at one of many attempts."""
    return f".{name}.{attempt}.tmp" if attempt else f".{name}.tmp"
