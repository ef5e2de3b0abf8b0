"""Run `packvit` in forks of one process, under strace where that is asked: for the crash points.

    python crash_server.py PHOTOS CHECKPOINT OUT WORKERS

stdin: a JSON line for each command: its arguments, a file for what it prints, whether two folders
can be exchanged in one step, strace's options (none: it runs alone). stdout: its exit status.
Importing torch takes longer than a whole job. Decode workers are forked at the address WORKERS.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_workers import install

SET_PTRACER = 0x59616D61  # Linux, prctl.h


def run(arguments: list[str], printed: str, strace: list[str]) -> int:
    """Return the exit status of a command in a fork, which strace holds before it begins."""
    import torch

    from packvit.cli import main

    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(SET_PTRACER, ctypes.c_ulong(-1))  # lets strace in
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
    from packvit.corpus.folder import merging, swapping  # noqa: F401

    torch.set_num_threads(1)
    photos, checkpoint, out, workers = sys.argv[1:]
    install(Path(workers), pytest.MonkeyPatch())
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
    serve()
