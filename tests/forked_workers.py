"""Decode workers as forks of one warm process: starting one takes longer than a small job.

    python forked_workers.py LISTENER

forks one for each connection to a socket that it inherits. `ForkedWorker` asks for it, where a job
has `subprocess.Popen`.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

SET_PDEATHSIG = 1  # Linux, prctl.h


def fork_workers(listener: socket.socket) -> NoReturn:
    """Fork a decode worker for each connection, which sends its stdin and its socket."""
    import numpy  # noqa: F401 # what a worker imports
    from PIL import AvifImagePlugin  # noqa: F401

    import packvit.corpus.decode.prepare
    import packvit.corpus.inputs.sources
    import packvit.gpu.jpeg  # noqa: F401
    from packvit.corpus.decode import worker

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        with listener.accept()[0] as connection:
            _, (stdin, link), _, _ = socket.recv_fds(connection, 1, 2)
            pid = os.fork()
            if not pid:
                os.dup2(stdin, 0)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                for descriptor in (stdin, connection.fileno(), listener.fileno()):
                    os.close(descriptor)
                sys.argv = ["worker", str(link)]
                worker.main()
                os._exit(0)
            os.close(stdin)
            os.close(link)
            connection.send(pid.to_bytes(4, "big"))


class ForkedWorker:
    """What `subprocess.Popen` is to a job, for decode workers."""

    address = ""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], **options: Any) -> None:
        stdin, writer = os.pipe()
        self.stdin = os.fdopen(writer, "wb")
        self.returncode: int | None = None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self.address)
            socket.send_fds(connection, [b"w"], [stdin, *pass_fds])
            self.pid = int.from_bytes(connection.recv(4), "big")
        os.close(stdin)
        self.process = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        ended = select.poll()
        ended.register(self.process, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        self.returncode = 0
        return 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)


def install(address: Path, patch: pytest.MonkeyPatch) -> None:
    """Have jobs of this process fork their decode workers at an address."""
    from packvit.corpus.decode import processes

    names = ("PIPE", "DEVNULL", "TimeoutExpired")
    same = {name: getattr(subprocess, name) for name in names}
    patch.setattr(ForkedWorker, "address", str(address))
    patch.setattr(processes, "subprocess", SimpleNamespace(Popen=ForkedWorker, **same))


@contextlib.contextmanager
def forking(address: Path) -> Iterator[None]:
    """Fork decode workers at `address`, for whoever has installed it, until the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno())]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, pass_fds=[listener.fileno()], env=env) as process:
            try:
                yield
            finally:
                process.kill()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    fork_workers(socket.socket(fileno=int(sys.argv[1])))
