"""Run `packvit` in forks of one process, under strace where that is asked: for the crash points.

    python crash_server.py PHOTOS CHECKPOINT OUT

stdin: a JSON line for each command: its arguments, a file for what it prints, whether two folders
can be exchanged in one step, strace's options (none: it runs alone). stdout: its exit status.
Importing torch takes longer than a whole job, and so does starting a decode worker, so those are
forks too.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

SET_PDEATHSIG, SET_PTRACER = 1, 0x59616D61  # Linux, prctl.h


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value))


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


def run(arguments: list[str], printed: str, strace: list[str]) -> int:
    """Return the exit status of a command in a fork, which strace holds before it begins."""
    import torch

    from packvit.cli import main

    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        prctl(SET_PTRACER, -1)
        descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.read(ready, 1)
        torch.set_num_threads(1)  # a fork's pool is made anew, which two threads must not both do
        try:
            main(arguments)
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(int(ended.code or 0))  # taking the interpreter down takes longer than a job
    tracer = None
    if strace:
        command = ["strace", "-f", "-p", str(pid), *strace]
        tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while tracer and "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, "strace could not take hold of the job"
        time.sleep(0.001)
    os.write(go, b"!")
    os.close(go)
    os.close(ready)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if tracer:
        tracer.wait()
    return status


def serve() -> None:
    """Run a job that imports all that there is to import, and then the commands of stdin."""
    import torch

    import packvit
    from packvit import atomic
    from packvit.cli import main
    from packvit.corpus.decode import processes
    from packvit.corpus.folder import merging, swapping  # noqa: F401

    torch.set_num_threads(1)
    names = ("PIPE", "DEVNULL", "TimeoutExpired")
    same = {name: getattr(subprocess, name) for name in names}
    processes.subprocess = SimpleNamespace(Popen=ForkedWorker, **same)
    photos, checkpoint, out = sys.argv[1:]
    packvit.embed(
        photos, out=out, model=checkpoint, device="cpu", tokens=True, format="npy", workers=1
    )
    with contextlib.redirect_stdout(sys.stderr):
        again = ["embed", photos, "--out", out, "--model", checkpoint, "--device", "cpu"]
        main([*again, "--tokens"], standalone_mode=False)
    numbers = itertools.count()  # a call must meet the same name in every run
    atomic.token_hex = lambda size: f"{next(numbers):0{2 * size}x}"
    exchange = swapping.RENAME_EXCHANGE
    gc.collect()
    gc.freeze()  # what forks need not copy
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, printed, exchanges, strace = json.loads(line)
        swapping.RENAME_EXCHANGE = exchange if exchanges else 1 << 10  # which no kernel knows
        print(run(arguments, printed, strace), flush=True)


if __name__ == "__main__":
    ForkedWorker.address = f"{sys.argv[-1]}.socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        Path(ForkedWorker.address).parent.mkdir(parents=True, exist_ok=True)
        listener.bind(ForkedWorker.address)
        listener.listen()
        if not os.fork():
            prctl(SET_PDEATHSIG, signal.SIGKILL)
            fork_workers(listener)
    serve()
