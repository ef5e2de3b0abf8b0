"""Run shards in one process for each GPU, or for each share of the CPUs.

The processes are started before anything is known of the job (`launching.py`). They load the
encoder once it is known, and are sent the job once it is described. Shards go to idle processes. A
process that dies is replaced, and its shards are sent again. A process ends when its connection
closes: at the end of the job, or if its parent dies.
"""

import os
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, NoReturn

import torch

from packvit.corpus import EmbedderError
from packvit.corpus.encode.context import EmbedContext, make_context
from packvit.corpus.encode.filling import Part, Shard
from packvit.corpus.encode.shard import embed_shards
from packvit.corpus.folder.layout import Commit
from packvit.corpus.folder.names import part_name
from packvit.corpus.folder.ownership import remove_left_over
from packvit.corpus.loading import load_encoder
from packvit.corpus.runners.embedder import (
    Finished,
    Job,
    Stager,
    check_alike,
    portable,
    take_waiting,
)
from packvit.corpus.runners.launching import Started, end, start
from packvit.corpus.runners.order import TRIES, Sequencer, Work, enter_all
from packvit.corpus.settings import EmbedOptions, ModelChoice
from packvit.gpu.decoder import begin_engine

IN_HAND = 2  # shards sent to each embedder: one to embed, and one to decode meanwhile
AHEAD = 4  # shards for each embedder between the first unfinished one and the last handed out
PATIENCE = 10.0  # seconds that an embedder may take to exit


@dataclass(frozen=True, slots=True)
class Loading:
    """What an embedder needs to know to load its encoder, and to start its decode workers."""

    choice: ModelChoice
    options: EmbedOptions  # not yet fitted to the encoder
    threads: int


@dataclass(slots=True)
class Embedder:
    """An embedder process, as its parent sees it."""

    slot: int
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    shards: deque[Shard] = field(default_factory=deque)  # the first is the one in work


def run_processes(pool: "Pool", work: Work) -> Generator[Commit, None, None]:
    """Embed shards in the processes of a pool, and commit them here, in order.

    Raises: EmbedderError if a shard loses its process `TRIES` times; WriteError if a part cannot
    be written.
    """
    try:
        yield from enter_all(pool.run(work.shards, work.count), work)
    finally:
        pool.close()
        remove_left_over(work.folder)


class Pool:
    """The embedder processes of a job."""

    def __init__(self, started: Sequence[Started]) -> None:
        self.embedders: dict[Connection, Embedder] = {}
        for slot, each in enumerate(started):
            self.add(slot, each)
        self.loadings: list[Loading] = []  # by slot; empty until the model is known
        self.job: Job | None = None
        self.unsent = 0  # shards that no embedder was sent yet
        self.returned: deque[Shard] = deque()  # by embedders that died
        self.drained = False  # every shard was sent at least once
        self.losses: Counter[int | None] = Counter()  # by shard; None before the first shard

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self.embedders)

    def keep(self, most: int) -> None:
        """End processes until at most `most` are left, first those that are still loading."""
        while self.count > max(1, most):
            last = min(self.embedders.values(), key=lambda each: (each.ready, -each.slot))
            del self.embedders[last.connection]
            end([Started(last.process, last.connection)])

    def add(self, slot: int, started: Started) -> Embedder:
        """Add a process."""
        embedder = Embedder(slot, started.process, started.connection)
        self.embedders[started.connection] = embedder
        return embedder

    def load(self, choice: ModelChoice, options: EmbedOptions, devices: Sequence[str]) -> None:
        """Have every process load the encoder on the device of its slot, and start its workers."""
        threads = max(1, torch.get_num_threads() // self.count)
        placed = [replace(choice.options, device=device) for device in devices]
        self.loadings = [Loading(replace(choice, options=o), options, threads) for o in placed]
        for embedder in self.embedders.values():
            self.send(embedder, self.loadings[embedder.slot])

    def give(self, job: Job) -> None:
        """Send the job to all processes."""
        self.job = job
        for embedder in self.embedders.values():
            self.send(embedder, job)

    def await_ready(self) -> None:
        """Wait until a process has loaded its encoder.

        Raises: what loading raises; EmbedderError if processes die again and again.
        """
        order = Sequencer()  # of no shards yet
        while not any(embedder.ready for embedder in self.embedders.values()):
            self.await_messages(order)

    def run(self, shards: Iterable[Shard], count: int) -> Iterator[Finished]:
        """Yield all `count` shards in order, each when its part is staged."""
        source, order = iter(shards), Sequencer()
        self.unsent = count
        self.keep(count)
        while True:
            self.hand_out(source, order)
            if self.drained and not order.numbers:
                return
            self.await_messages(order)
            yield from order.release()

    def await_messages(self, order: Sequencer) -> None:
        """Wait for messages of embedders, and handle one of each that has any."""
        for connection in wait(list(self.embedders)):
            assert isinstance(connection, Connection)
            self.receive(self.embedders[connection], order)

    def hand_out(self, source: Iterator[Shard], order: Sequencer) -> None:
        """Send shards to embedders that can take one, those with the fewest first."""
        while free := self.free():
            if self.returned:
                shard = self.returned.popleft()
            elif self.drained or len(order.numbers) >= AHEAD * self.count:
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

    def send(self, embedder: Embedder, message: object) -> None:
        """Send to an embedder; if it is dead, `receive` notices."""
        with suppress(BrokenPipeError, ConnectionResetError):
            embedder.connection.send(message)

    def receive(self, embedder: Embedder, order: Sequencer) -> None:
        """Handle an embedder's next message, or its death."""
        try:
            message = embedder.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
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
        successor = self.add(embedder.slot, start())
        for message in (self.loadings[embedder.slot], self.job):
            if message is not None:
                self.send(successor, message)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        unready = [each for each in self.embedders.values() if not each.ready]
        end(Started(each.process, each.connection) for each in unready)
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
    messages: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=receive, args=(connection, messages), daemon=True).start()
    loading = messages.get()
    assert isinstance(loading, Loading)
    torch.set_num_threads(loading.threads)
    device = torch.device(str(loading.choice.options.device))
    writer = ThreadPoolExecutor(1, "packvit-stage")  # sends all messages, one by one
    try:
        with loading.options.decoders() as decoders:
            decoders.start(loading.options.workers)  # while the model is loaded
            engine = None
            if device.type == "cuda":
                torch.cuda.set_device(device)
                engine = begin_engine(device) if loading.options.decode == "gpu" else None
            encoder, weights = load_encoder(loading.choice)
            job = messages.get()
            assert isinstance(job, Job)
            check_alike(job, encoder, weights)
            context = make_context(encoder, job.options, decoders, engine)
            embed_all(context, job, connection, messages, writer)
    except Exception as error:
        writer.submit(connection.send, portable(error))
        threading.Event().wait()  # until the parent has read it and closes the connection


def embed_all(
    context: EmbedContext,
    job: Job,
    connection: Connection,
    shards: SimpleQueue[Any],
    writer: ThreadPoolExecutor,
) -> NoReturn:
    """Embed the shards that arrive, and stage and send their parts."""
    stager = Stager(job)

    def send(part: Part) -> None:
        try:
            connection.send(stager.stage(part))
        except Exception as error:
            connection.send(portable(error))

    writer.submit(connection.send, "ready")
    while True:
        coming = take_waiting(shards.get(), shards)
        for part in embed_shards(context, coming, lambda rows: None, stager.effort):
            writer.submit(send, part)


def receive(connection: Connection, messages: SimpleQueue[Any]) -> None:
    """Queue the messages that arrive, and exit when the connection closes."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):  # OSError: the parent died in the middle of a message
        os._exit(0)
