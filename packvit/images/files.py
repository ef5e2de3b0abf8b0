"""The bytes of a regular file, within limits. No torch."""

import errno
import os
import stat

from packvit.images.errors import ImageError, Stage

MAX_BYTES = 2**31  # a sparse file of a terabyte costs nothing to make and all memory to read


def find_file(path: str | os.PathLike[str], stage: Stage = "read") -> os.stat_result:
    """Return what the system says of a regular file; links are followed, and nothing is opened.

    Raises: ImageError missing, not_a_file or unreadable.
    """
    try:
        found = os.stat(path)  # before opening: opening a pipe would wait for its other end
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in it
        raise ImageError("missing", stage) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ImageError("missing", stage, "links in a circle") from error
        raise ImageError("unreadable", stage) from error
    if not stat.S_ISREG(found.st_mode):
        raise ImageError("not_a_file", stage)
    return found


def check_size(size: int) -> None:
    """Refuse what is too large to be held.

    Raises: ImageError unreadable.
    """
    if size > MAX_BYTES:
        raise ImageError("unreadable", "read", f"over {MAX_BYTES >> 30} GiB")


def read_file(path: str | os.PathLike[str], start: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a regular file, or `size` of them from `start` on, or what there is.

    Raises: ImageError missing, not_a_file or unreadable.
    """
    whole = find_file(path).st_size
    check_size(whole if size is None else size)
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if size is None else file.read(size)
    except MemoryError as error:
        raise ImageError("out_of_memory", "read") from error
    except OSError as error:
        raise ImageError("unreadable", "read") from error
