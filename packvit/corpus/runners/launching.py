"""Start the processes that embed on this host before the job is known. No torch.

They import it meanwhile, as their parent does.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from packvit.corpus import EmbedderError

SERVE = "import sys; from packvit.corpus.runners.host import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A process that embeds, and the connection to it; it ends once that is closed."""

    process: subprocess.Popen[bytes]
    connection: Connection


def start() -> Started:
    """Start one process, which imports nothing that lies in the working folder by chance.

    Raises: EmbedderError if the system refuses another one.
    """
    try:
        ours, its = Pipe()
    except OSError as error:
        raise refused(error) from error
    paths = [os.path.abspath(path) for path in sys.path]
    # Ctrl-C reaches every process of a terminal: only the parent handles it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, str(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is for results only
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except OSError as error:
        ours.close()
        raise refused(error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()  # with the process's own copy the connection ends
    return Started(process, ours)


def refused(error: OSError) -> EmbedderError:
    """Return the error for a process that cannot be started."""
    return EmbedderError(
        f"A process that embeds could not be started: {error.strerror}. Ask for fewer `processes`."
    )


def end(processes: Iterable[Started]) -> None:
    """End processes that have nothing to write, whatever they are doing."""
    ended = list(processes)
    for each in ended:
        each.connection.close()
        each.process.kill()
    for each in ended:
        each.process.wait()


class Launched(AbstractContextManager["Launched"]):
    """The processes of a job, started ahead of it; those that it has not taken end with this."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.started: list[Started] = []
        try:
            for _ in range(count):
                self.started.append(start())
        except EmbedderError:
            end(self.take())
            raise

    def take(self) -> list[Started]:
        """Return the processes, which the caller ends from now on."""
        taken, self.started = self.started, []
        return taken

    def __exit__(self, *reason: object) -> None:
        end(self.take())
