"""`packvit` and `python -m packvit`: the command, which Ctrl-C stops cleanly from its start."""

import os
import signal
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """End the process at once, as long as nothing has begun."""
    os.write(2, b"Stopped. Run the same command again to start over.\n")
    os._exit(130)


def run() -> None:
    """Run the command that was typed; until it begins, Ctrl-C ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's & ignores it
        signal.signal(signal.SIGINT, stop)
    from packvit.cli.program import run as run_command

    run_command()


if __name__ == "__main__":
    run()
