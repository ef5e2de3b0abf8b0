"""How much is read of whatever comes from outside: SECURITY.md promises these numbers. No torch."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

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
MOST_ROWS = 10  # of a table for each byte of its file, above FEW_ROWS: null rows take no space
FEW_ROWS = 1_000_000
MOST_MEMORY = (
    500 << 20
)  # that a library may take to unpack a table, beside copies of what is packed


@contextmanager
def limited_memory(most: int) -> Iterator[None]:
    """Let this process take at most `most` bytes more while the context lasts, on Linux.

    Only for a process that does nothing else: its other threads would meet the limit too.
    """
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()  # data and stacks
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (held + most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
