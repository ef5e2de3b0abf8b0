"""How much memory there is, and whether it ran out, however a library says so. No torch."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of exceptions that have no class of their own. Source: torch 2.13, c10/core/impl/alloc_cpu.cpp,
# and oneDNN; C++'s std::bad_alloc; glibc's dlopen; mmap of safetensors and the standard library.
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "Cannot allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "could not create a memory object",
    "out of memory",
    "can't start new thread",
)
KINDS = (RuntimeError, OSError, ImportError, SystemError, ValueError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or what caused it, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, KINDS) and any(words in str(seen) for words in WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def suppressed() -> Iterator[None]:
    """Pass over an exception that says that memory ran out; what its frames hold is freed."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def free_host_memory() -> int | None:
    """Return the bytes that this process could still take on the host, on Linux; None elsewhere.

    The least of what the system has, its control group may take, and `ulimit` leaves.
    """
    if not os.path.exists("/proc/self/statm"):
        return None
    import resource  # not on Windows

    with open("/proc/meminfo") as file:
        lines = (line.split() for line in file)
        bounds = [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    bounds += [each for each in (unmapped(),) if each is not None]
    bounds += [*free_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()  # data and stacks
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return min([*bounds, *([] if soft == resource.RLIM_INFINITY else [max(0, soft - used)])])


def unmapped() -> int | None:
    """Return how many bytes `ulimit -v` lets this process map yet; None without such a limit."""
    if not os.path.exists("/proc/self/statm"):
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/statm") as file:
        return max(0, soft - int(file.read().split()[0]) * resource.getpagesize())


def free_in_groups(mounted: Path, named: Path) -> list[int]:
    """Return what the control group that a process is in, and those around it, could still take.

    What files of the disk take there is given up where it is needed.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst.
    """
    found = []
    try:
        groups = [line[3:] for line in named.read_text().splitlines() if line.startswith("0::")]
        group = mounted / "".join(groups).strip("/")
        for each in (group, *group.parents):
            if (each / "memory.max").is_file():
                most = (each / "memory.max").read_text().strip()
                facts = dict(
                    line.split() for line in (each / "memory.stat").read_text().splitlines()
                )
                used = int((each / "memory.current").read_text()) - int(facts["inactive_file"])
                found += [] if most == "max" else [max(0, int(most) - used)]
    except (OSError, ValueError, KeyError):  # not this version, or hidden: then it bounds nothing
        pass
    return found


def has_room_to_start(*, torch: bool = True) -> bool:
    """Return whether a command can import torch and pyarrow, which abort where they cannot.

    With their threads they map 1.1 GB (torch 2.13, pyarrow 26), and use less than half of that;
    pyarrow alone maps 300 MB.
    """
    mapped, free = unmapped(), free_host_memory()
    least, used = (1200 << 20, 300 << 20) if torch else (350 << 20, 100 << 20)
    return (mapped is None or mapped > least) and (free is None or free > used)
