"""Run shards in one process for each GPU, or for each share of the CPUs.

Shards go to idle processes. A process that dies is replaced, and its shards are sent again. A
process ends when its connection closes: at the end of the job, or if its parent dies.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue

import torch

from packvit.corpus import EmbedderError
from packvit.corpus.encode.context import make_context
from packvit.corpus.encode.filling import Part, Shard
from packvit.corpus.encode.shard import embed_shards
from packvit.corpus.folder.layout import Commit
from packvit.corpus.folder.names import part_name
from packvit.corpus.folder.resume import remove_left_over
from packvit.corpus.runners.embedder import Finished, Job, Stager, load_alike, portable
from packvit.corpus.runners.order import TRIES, Sequencer, Work, enter_all
from packvit.gpu.decoder import begin_engine

SERVE = "import sys; from packvit.corpus.runners.host import serve; serve(int(sys.argv[1]))"
IN_HAND = 2  # shards sent to each embedder: one to embed, and one to decode meanwhile
AHEAD = 4  # shards for each embedder between the first unfinished one and the last handed out
PATIENCE = 10.0  # seconds that an embedder may take to exit


@dataclass(slots=True)
class Embedder:
    """An embedder process, as its parent sees it."""

    slot: int
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    shards: deque[Shard] = field(default_factory=deque)  # the first is the one in work


def run_processes(job: Job, devices: Sequence[str], work: Work) -> Generator[Commit, None, None]:
    """Embed shards in a process for each of `devices`, and commit them here, in order.

    Raises: EmbedderError if a shard loses its process `TRIES` times; WriteError if a part cannot
    be written.
    """
    torch.cuda.empty_cache()  # frees what loading the encoder here took; does nothing without CUDA
    pool = Pool(job, devices[: max(1, work.count)])
    try:
        yield from enter_all(pool.run(work.shards, work.count), work)
    finally:
        pool.close()
        remove_left_over(work.folder)


class Pool:
    """The embedder processes of a job."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job = replace(job, embedders=len(devices))
        self.devices = devices
        self.threads = max(1, torch.get_num_threads() // len(devices))
        self.unsent = 0  # shards that no embedder was sent yet
        self.embedders: dict[Connection, Embedder] = {}
        self.returned: deque[Shard] = deque()  # by embedders that died
        self.drained = False  # every shard was sent at least once
        self.losses: Counter[int | None] = Counter()  # by shard; None before the first shard

    def run(self, shards: Iterable[Shard], count: int) -> Iterator[Finished]:
        """Yield all `count` shards in order, each when its part is staged."""
        source, order = iter(shards), Sequencer()
        self.unsent = count
        for slot in range(len(self.devices)):
            self.start(slot)
        while True:
            self.hand_out(source, order)
            if self.drained and not order.numbers:
                return
            for connection in wait(list(self.embedders)):
                assert isinstance(connection, Connection)
                self.receive(self.embedders[connection], order)
            yield from order.release()

    def hand_out(self, source: Iterator[Shard], order: Sequencer) -> None:
        """Send shards to embedders that can take one, those with the fewest first."""
        while free := self.free():
            if self.returned:
                shard = self.returned.popleft()
            elif self.drained or len(order.numbers) >= AHEAD * len(self.devices):
                return
            else:
                shard = next(source, None)
                if shard is None:
                    self.drained = True
                    return
                self.unsent -= 1
                order.expect(shard.number)
            embedder = min(free, key=lambda embedder: len(embedder.shards))
            embedder.shards.append(shard)
            self.send(embedder, shard)

    def free(self) -> list[Embedder]:
        """Return the embedders that can take a shard.

        One that has a shard already gets another only if some are left for those that have none,
        even if they still load the model: the few shards of a small job go to all of them.
        """
        idle = sum(not embedder.shards for embedder in self.embedders.values())
        hand = IN_HAND if self.unsent + len(self.returned) > idle else 1
        return [e for e in self.embedders.values() if e.ready and len(e.shards) < hand]

    def start(self, slot: int) -> None:
        """Start the process of a slot; it reports when the encoder is loaded."""
        ours, its = Pipe()
        # Ctrl-C reaches every process of a terminal: only the parent handles it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for results only
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            its.close()  # with the process's own copy the connection ends
        self.embedders[ours] = embedder = Embedder(slot, process, ours)
        self.send(embedder, (self.job, self.devices[slot], self.threads))

    def send(self, embedder: Embedder, message: object) -> None:
        """Send to an embedder; if it is dead, `receive` notices."""
        with suppress(BrokenPipeError, ConnectionResetError):
            embedder.connection.send(message)

    def receive(self, embedder: Embedder, order: Sequencer) -> None:
        """Handle an embedder's next message, or its death."""
        try:
            message = embedder.connection.recv()
        except (EOFError, ConnectionResetError):
            self.replace(embedder)
            return
        if isinstance(message, Exception):
            raise message
        embedder.ready = True
        if isinstance(message, Finished):
            done = embedder.shards.popleft()
            assert done.number == message.number
            order.add(message)

    def replace(self, embedder: Embedder) -> None:
        """Replace a process that died, and take its shards back.

        Raises: EmbedderError if `TRIES` processes died on the same shard.
        """
        status = embedder.process.wait()
        del self.embedders[embedder.connection]
        embedder.connection.close()
        number = embedder.shards[0].number if embedder.shards else None
        self.losses[number] += 1
        if self.losses[number] >= TRIES:
            doing = f"embedded {part_name(number)}" if number is not None else "loaded the model"
            raise EmbedderError(
                f"The process that {doing} died {TRIES} times, the last time with exit status "
                f"{status}. If memory ran out, ask for fewer processes or a smaller token_budget; "
                "then the same command resumes after what is written."
            )
        self.returned.extendleft(reversed(embedder.shards))
        self.start(embedder.slot)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for embedder in self.embedders.values():
            embedder.connection.close()
        for embedder in self.embedders.values():
            try:
                embedder.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                embedder.process.kill()
                embedder.process.wait()
        self.embedders.clear()


def serve(descriptor: int) -> None:
    """Run an embedder on the other end of a connection, until it closes."""
    connection = Connection(descriptor)
    if torch.cuda.is_available():
        from packvit.fast.imports import import_ahead  # kernels, which a GPU alone has

        import_ahead()
    job, device, threads = connection.recv()
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    shards: SimpleQueue[Shard] = SimpleQueue()
    threading.Thread(target=receive, args=(connection, shards), daemon=True).start()
    stager = Stager(job)
    writer = ThreadPoolExecutor(1, "packvit-stage")  # sends all messages, one by one

    def send(part: Part) -> None:
        try:
            connection.send(stager.stage(part))
        except Exception as error:
            connection.send(portable(error))

    try:
        with job.options.decoders() as decoders:
            decoders.start(job.options.workers)  # while the model is loaded
            gpu = job.options.decode == "gpu"
            engine = begin_engine(torch.device(device)) if gpu else None
            context = make_context(load_alike(job, device), job.options, decoders, engine)
            writer.submit(connection.send, "ready")
            while True:
                coming = take_waiting(shards.get(), shards)
                for part in embed_shards(context, coming, lambda rows: None, stager.effort):
                    writer.submit(send, part)
    except Exception as error:
        writer.submit(connection.send, portable(error))
        threading.Event().wait()  # until the parent has read it and closes the connection


def take_waiting(first: Shard, shards: SimpleQueue[Shard]) -> Iterator[Shard]:
    """Yield a shard and those that are queued behind it, without waiting for more.

    Waiting could deadlock: a shard's last packs stay in flight until another shard follows or the
    iterator ends, and the parent may need that shard before it sends another.
    """
    yield first
    with suppress(Empty):
        while True:
            yield shards.get_nowait()


def receive(connection: Connection, shards: SimpleQueue[Shard]) -> None:
    """Queue the shards that arrive, and exit when the connection closes."""
    try:
        while True:
            shards.put(connection.recv())
    except (EOFError, ConnectionResetError):
        os._exit(0)
