"""Import what the first forward on a GPU needs ahead of it, and no more of it than that takes."""

import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock, Thread

from packvit.fast.caches import keep_kernels
from packvit.version import version_of

KERNELS = ("activations", "attention", "gates", "matmuls", "norms")
# Of these versions of quack-kernels flash-attn-4 takes a few modules. quack's __init__ imports its
# operators too, and those torch's compiler: 1.1 of the 1.9 s of CPU that flash_attn.cute takes.
# Compiled without it, kernels are the same files byte for byte.
SPARE = ("0.6.5",)
PATCHED = "CUTE_DSL_PTXAS_PATH"  # where this is set, quack's __init__ changes how they are compiled


@cache
def import_ahead() -> Thread:
    """Import what the first forward on a GPU needs in a thread, one a process, and return it.

    These imports take 1 s, in which the caller reads weights, which needs little of Python. Join
    the thread before the first forward: flash-attn-4's modules import each other in circles, and
    where two threads import such ones, Python gives one of them a module that is half made. What
    cannot be imported is left to the backend that takes it: `packvit info` says why it cannot run.
    """

    def try_to_import() -> None:
        with suppress(ImportError):
            import_kernels()

    thread = Thread(target=try_to_import, name="packvit-imports", daemon=True)
    thread.start()
    return thread


def import_kernels() -> None:
    """Import our Triton kernels and flash-attn-4, where they are installed."""
    keep_kernels()
    if find_spec("triton") is None:
        return
    for name in KERNELS:
        import_module(f"packvit.fast.kernels.{name}")
    if find_spec("flash_attn") and find_spec("flash_attn.cute"):
        if PATCHED not in os.environ and version_of("quack-kernels") in SPARE:
            import_sparing("flash_attn.cute", "quack", first=("quack.dsl",))
        else:
            import_module("flash_attn.cute")


def import_sparing(name: str, package: str, *, first: tuple[str, ...]) -> None:
    """Import `name`, which takes some modules of a `package`, and put off the package's __init__.

    It runs once anything that it defines is asked for. `first` are the package's modules that have
    effects of their own, in the order of its __init__.
    """
    spec = None if package in sys.modules else find_spec(package)
    if spec is None or spec.loader is None:
        import_module(name)
        return
    loader, module = spec.loader, module_from_spec(spec)

    lock, begun = RLock(), []

    def complete(attribute: str) -> object:
        with lock:  # others wait here, while the package's own lookups go on to what it has so far
            if not begun:
                begun.append(True)
                loader.exec_module(module)
                if module.__dict__.get("__getattr__") is complete:
                    del module.__dict__["__getattr__"]
        if attribute in module.__dict__:
            return module.__dict__[attribute]
        raise AttributeError(f"module {package!r} has no attribute {attribute!r}")

    sys.modules[package] = module
    try:
        for each in (*first, name):
            import_module(each)
    finally:
        module.__dict__["__getattr__"] = complete
