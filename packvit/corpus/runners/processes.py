"""One process for each GPU, or for a share of the CPUs: shards go to whoever has none to do.

A process that dies is replaced, and its shards are handed out again. It hears of the job's end, or
of its parent's death, by the end of its connection.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue

import torch

from packvit.corpus import WorkerError
from packvit.corpus.folder import Commit, part_name
from packvit.corpus.resume import remove_left_over
from packvit.corpus.runners.order import TRIES, Sequencer, Work, enter_all
from packvit.corpus.runners.worker import Finished, Job, finish, portable, prepare
from packvit.corpus.shard import Shard

SERVE = "import sys; from packvit.corpus.runners.processes import serve; serve(int(sys.argv[1]))"
IN_HAND = 2  # shards at each worker: one to do, and one so that it need not wait for the next
AHEAD = 4  # shards for each worker between the first unfinished one and the last handed out
PATIENCE = 10.0  # seconds that a worker may take to end when it is told to


@dataclass(slots=True)
class Worker:
    """A worker process, as its parent sees it."""

    slot: int
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    shards: deque[Shard] = field(default_factory=deque)  # the first is the one that it does


def run_processes(job: Job, devices: Sequence[str], work: Work) -> Generator[Commit, None, None]:
    """Embed shards in a process for each of `devices`, and commit them here, in their order.

    Raises: WorkerError if a shard loses its process `TRIES` times; WriteError if the disk does not
    take a part.
    """
    torch.cuda.empty_cache()  # of the encoder that described the job; does nothing without CUDA
    crew = Crew(job, devices[: max(1, work.count)])
    try:
        yield from enter_all(crew.run(work.shards), work)
    finally:
        crew.dismiss()
        remove_left_over(work.folder)


class Crew:
    """The worker processes of a job."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job = job
        self.devices = devices
        self.threads = max(1, torch.get_num_threads() // len(devices))
        self.workers: dict[Connection, Worker] = {}
        self.returned: deque[Shard] = deque()  # by workers that died
        self.drained = False  # no shard is left that was never handed out
        self.losses: Counter[int | None] = Counter()  # by shard; None while there is none yet

    def run(self, shards: Iterable[Shard]) -> Iterator[Finished]:
        """Yield all shards in their order, each when its part is staged."""
        source, order = iter(shards), Sequencer()
        for slot in range(len(self.devices)):
            self.start(slot)
        while True:
            self.hand_out(source, order)
            if self.drained and not order.numbers:
                return
            for connection in wait(list(self.workers)):
                assert isinstance(connection, Connection)
                self.hear(self.workers[connection], order)
            yield from order.release()

    def hand_out(self, source: Iterator[Shard], order: Sequencer) -> None:
        """Give shards to the workers that can take one, to those with the fewest first."""
        while free := [w for w in self.workers.values() if w.ready and len(w.shards) < IN_HAND]:
            if self.returned:
                shard = self.returned.popleft()
            elif self.drained or len(order.numbers) >= AHEAD * len(self.devices):
                return
            else:
                shard = next(source, None)
                if shard is None:
                    self.drained = True
                    return
                order.expect(shard.number)
            worker = min(free, key=lambda worker: len(worker.shards))
            worker.shards.append(shard)
            self.send(worker, shard)

    def start(self, slot: int) -> None:
        """Start the process of a slot; it says when it has loaded the encoder."""
        ours, its = Pipe()
        # Ctrl-C reaches every process of a terminal: the parent alone heeds it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # results alone go to stdout
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            its.close()  # with the process's own copy the connection ends
        self.workers[ours] = worker = Worker(slot, process, ours)
        self.send(worker, (self.job, self.devices[slot], self.threads))

    def send(self, worker: Worker, message: object) -> None:
        """Send to a worker; that it is dead is heard where it is listened to."""
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(message)

    def hear(self, worker: Worker, order: Sequencer) -> None:
        """Take what a worker has to say, or its silence."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self.replace(worker)
            return
        if isinstance(message, Exception):
            raise message
        worker.ready = True
        if isinstance(message, Finished):
            done = worker.shards.popleft()
            assert done.number == message.number
            order.add(message)

    def replace(self, worker: Worker) -> None:
        """Start a process in the place of one that died, and take its shards back.

        Raises: WorkerError if too many have died over the same.
        """
        status = worker.process.wait()
        del self.workers[worker.connection]
        worker.connection.close()
        number = worker.shards[0].number if worker.shards else None
        self.losses[number] += 1
        if self.losses[number] >= TRIES:
            doing = f"embedded {part_name(number)}" if number is not None else "loaded the model"
            raise WorkerError(
                f"The process that {doing} died {TRIES} times, the last time with exit status "
                f"{status}. If memory ran out, ask for fewer processes or a smaller token_budget; "
                "then the same command goes on after what is written."
            )
        self.returned.extendleft(reversed(worker.shards))
        self.start(worker.slot)

    def dismiss(self) -> None:
        """End all processes, whatever they are doing."""
        for worker in self.workers.values():
            worker.connection.close()
        for worker in self.workers.values():
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self.workers.clear()


def serve(descriptor: int) -> None:
    """Be a worker on the other end of a connection, until it ends."""
    connection = Connection(descriptor)
    job, device, threads = connection.recv()
    torch.set_num_threads(threads)
    shards: SimpleQueue[Shard] = SimpleQueue()
    threading.Thread(target=receive, args=(connection, shards), daemon=True).start()
    try:
        encoder = prepare(job, device)
        connection.send("ready")
        while True:
            connection.send(finish(encoder, shards.get(), job))
    except Exception as error:
        connection.send(portable(error))
        threading.Event().wait()  # until the parent has read it and hangs up


def receive(connection: Connection, shards: SimpleQueue[Shard]) -> None:
    """Pass shards on, and end the process with the connection: nobody wants what it does then."""
    try:
        while True:
            shards.put(connection.recv())
    except (EOFError, ConnectionResetError):
        os._exit(0)
