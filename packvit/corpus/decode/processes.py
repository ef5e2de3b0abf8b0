"""Start, call, time out and replace decode worker processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock

import numpy as np

from packvit.corpus import DecoderError
from packvit.corpus.decode.prepare import Admit, JpegFile, Prepared, Preprocessing
from packvit.corpus.decode.worker import receive, receive_into, send
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.sources import Input

SECONDS_TO_START = 120.0  # 0.15 on an idle machine
PAUSES = (0.2, 1.0, 3.0)  # seconds, before a worker that died while starting is started again
# A worker exits with its parent; a signal sent to both must not end it and lose its image.
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENVIRONMENT = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
) | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # whose memory is free again once it is freed


class StartError(DecoderError):
    """A worker ended before it was ready."""


class Worker:
    """A decode worker process, called by one thread at a time."""

    def __init__(self) -> None:
        self.link, other = socket.socketpair()
        paths = [os.path.abspath(path) for path in sys.path]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "packvit.corpus.decode.worker", str(other.fileno())],
                stdin=subprocess.PIPE,  # closed when this process ends, and so ends the worker
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError as error:
            self.link.close()
            raise DecoderError(
                f"A decode worker could not be started: {error.strerror}. Ask for fewer `workers`."
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()
        self.ready = False

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def await_ready(self) -> None:
        """Wait until the process is ready.

        Raises: StartError if it ends instead, saying what ended it.
        """
        if self.ready:
            return
        try:
            self.link.settimeout(SECONDS_TO_START)
            self.ready = receive(self.link) == "ready"
        except TimeoutError as error:
            self.end()
            raise StartError(f"was not ready in {SECONDS_TO_START:g} seconds") from error
        except (EOFError, OSError) as error:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # its own end, before ours
            self.end()
            raise StartError(describe_end(self.process.returncode)) from error

    def prepare(
        self, sources: Sequence[Input], preprocessing: Preprocessing, admit: Admit, seconds: float
    ) -> tuple[list[Prepared], float]:
        """Return the first inputs prepared, and the seconds it took, without waiting in `admit`.

        A worker prepares as many inputs as it can, at least one. If it dies, or takes longer than
        `seconds`, it is killed; the image that it was sent alone, or had admitted, is an error. If
        it was sent several, which one failed is not known, and none is returned.

        Raises: DecoderError if the worker cannot start, or for a bug in it.
        """
        self.await_ready()
        stage, took, start = "read", 0.0, time.monotonic()

        def wait() -> None:
            self.link.settimeout(max(1e-3, start + seconds - took - time.monotonic()))

        def lost(code: str, stage: str, note: str | None = None) -> list[Prepared]:
            self.end()
            known = stage == "decode" or len(sources) == 1
            return [Prepared(Row(sources[0].id, code, stage, note))] if known else []

        try:
            wait()
            send(self.link, (sources, preprocessing))
            answer = receive(self.link)
            while isinstance(answer, float):  # seconds before a server is asked again
                start += answer
                wait()
                answer = receive(self.link)
            if isinstance(answer, int):
                took = time.monotonic() - start
                admit(answer)
                stage, start = "decode", time.monotonic()
                wait()
                send(self.link, None)
                answer = receive(self.link)
            if isinstance(answer, str):
                raise DecoderError(f"A decode worker failed on {answer}")
            wait()
            prepared = []
            for source, (row, shape, plan) in zip(sources, answer, strict=False):
                content = None if shape is None else np.empty(shape, np.uint8)
                if content is not None:
                    receive_into(self.link, content.reshape(-1).data)
                if plan is None or content is None:
                    prepared.append(Prepared(row, content))
                else:
                    prepared.append(Prepared(row, jpeg=JpegFile(content, plan, source)))
        except TimeoutError:
            prepared = lost("timeout", stage, f"over {seconds:g} s")
        except (EOFError, ConnectionError):
            prepared = lost("decoder_crash", "header" if stage == "read" else stage)
        return prepared, took + time.monotonic() - start

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        self.link.close()


class Workers:
    """A pool of decode workers; one is started if none is idle."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.idle: list[Worker] = []
        self.busy: set[Worker] = set()

    def start(self, count: int) -> None:
        """Start `count` workers without waiting for them."""
        for _ in range(count):
            self.idle.append(Worker())

    def borrow_ready(self, check: Callable[[], None]) -> Worker:
        """Return a worker that is ready and that only the caller uses.

        One that dies while starting is replaced, after growing pauses; `check` is called meanwhile
        and may raise.

        Raises: DecoderError, after the last pause, saying what ended them; what `check` raises.
        """
        for pause in (*PAUSES, None):
            check()
            worker = self.borrow()
            try:
                worker.await_ready()
                return worker
            except StartError as error:
                self.give_back(worker)
                if pause is None:
                    raise DecoderError(
                        f"Decode workers ended {len(PAUSES) + 1} times before their first image: "
                        f"the last one {error}."
                    ) from error
            except BaseException:
                self.give_back(worker)
                raise
            until = time.monotonic() + pause
            while time.monotonic() < until:
                check()
                time.sleep(0.05)
        raise AssertionError("the last try returns or raises")

    def borrow(self) -> Worker:
        """Return a worker that only the caller uses; it may still be starting."""
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.alive:
                    break
                worker.end()  # it died while idle, so no image is lost
            else:
                worker = Worker()
            self.busy.add(worker)
        return worker

    def give_back(self, worker: Worker) -> None:
        """Return a worker to the pool; one that died is dropped."""
        with self.lock:
            self.busy.discard(worker)
            if worker.alive:
                self.idle.append(worker)
            else:
                worker.end()  # it may have died after its answer; close its socket

    def stop_busy(self) -> None:
        """Kill the workers in use, so that the threads that wait for them return."""
        with self.lock:
            for worker in self.busy:
                worker.process.kill()

    def end(self) -> None:
        """Kill all idle workers."""
        for worker in self.idle:
            worker.process.kill()  # all before the first is waited for
        for worker in self.idle:
            worker.end()
        self.idle.clear()


def describe_end(code: int) -> str:
    """Return what ended a worker, and what to do: a predicate without its full stop."""
    if code >= 0:
        return (
            f"ended with exit code {code}; see what this says: {sys.executable} -c "
            "'import packvit.corpus.decode.prepare'"
        )
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "no name"
    advice = "; if memory ran out, ask for fewer `workers`" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){advice}"
