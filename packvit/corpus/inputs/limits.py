"""How much is read of whatever comes from outside: SECURITY.md promises these numbers. No torch."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from packvit.images.errors import ImageError

# The most bytes of a file whose length is unknown or may be wrong, as with compressed transfers.
MOST_UNDECLARED = 256 << 20
MOST_PAGE = 32 << 20  # bytes of a page of links after decompression: some 300,000 links
PAGE_SECONDS = 60.0  # for a page of links, each time it is asked for
SILENT_SECONDS = 60.0  # that a server may send nothing of a compressed tar
MOST_LIST = 2 << 30  # bytes of a list at a URL
MOST_LINE = 1 << 20  # bytes of a line of a list; systems take paths of 4 KiB
MOST_VALUES = 1 << 20  # bytes of what is kept of an input beside its features, such as a caption
MOST_KEPT = 64 << 20  # bytes of a table that are unpacked at a time, where that can be chosen
MOST_RATIO = 200  # of unpacked to packed size of a table, above that: photographs hardly compress
MOST_RATIO_OF_ZIP = 10  # of a zip's member or a compressed tar, above MOST_UNDECLARED
MOST_DIRECTORY = 16 << 20  # bytes of a zip's directory for zip://, some 200,000 members
MOST_FOOTER = 24 << 20  # bytes of a table's, which holds some 100,000 columns of row groups
MOST_ROWS = 10  # of a table for each byte of its file, above FEW_ROWS: null rows take no space
FEW_ROWS = 1_000_000
MOST_MEMORY = 430 << 20  # that reading a cell of a table may take beside the largest page
MOST_OF_PAGE = 460 << 20  # bytes that a table's page takes to unpack


def check_unpacked(size: int, packed: int) -> None:
    """Refuse what unpacks from `packed` bytes to far more than photographs do.

    Raises: ImageError unreadable.
    """
    if size > max(MOST_UNDECLARED, packed * MOST_RATIO_OF_ZIP):
        note = f"unpacks to over {MOST_RATIO_OF_ZIP} times its size"
        raise ImageError("unreadable", "read", note)


def held_memory() -> int:
    """Return the bytes of data and stacks that this process holds, on Linux; 0 elsewhere."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


@contextmanager
def limited_memory(most: int, beside: int | None = None) -> Iterator[None]:
    """Let this process hold at most `most` bytes more while the context lasts, on Linux.

    That is beside what it holds now, or what it held before. Only for a process that does nothing
    else: its other threads would meet the limit too.
    """
    held = held_memory() if beside is None else beside
    if not held:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (held + most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
