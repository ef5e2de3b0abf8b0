"""The `packvit` command as a process of its own, which ends as soon as it is done."""

import atexit
import os
import sys

from packvit.cli import main


def run() -> None:
    """Run the command that was typed, and end the process with its exit code."""
    try:
        main(prog_name="packvit")
    except SystemExit as ended:
        if "torch" in sys.modules and isinstance(ended.code, int):
            end_now(ended.code)
        raise


def end_now(code: int) -> None:
    """End the process without taking Python apart: 0.4 s with torch, and 2 s once it used CUDA.

    All files are closed by then. What was registered for the end is done first; if the output
    cannot be flushed, this returns, so that Python says so.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(code)
