"""A Ray actor that embeds shards, on one GPU if the cluster has any.

Ray Data calls it once for each shard. The calls only wait: one thread embeds what they queue, so
that the images of a shard are decoded while the one before is encoded, and another stages parts.
"""

import asyncio
import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NoReturn

from packvit.atomic import temporary_name
from packvit.corpus import EmbedderError
from packvit.corpus.encode.context import EmbedContext, make_context
from packvit.corpus.encode.filling import Part, Shard
from packvit.corpus.encode.shard import embed_shards
from packvit.corpus.folder.names import SPOOL, part_name
from packvit.corpus.folder.stores import Folder, StorePath, find_folder
from packvit.corpus.runners.embedder import (
    Finished,
    Job,
    Stager,
    load_alike,
    portable,
    take_waiting,
)
from packvit.corpus.runners.order import TRIES
from packvit.gpu.decoder import begin_engine
from packvit.gpu.nvjpeg import ask_for_queues

# Calls of an actor at a time: a shard that is embedded, one whose images are decoded meanwhile, and
# one on its way, since that takes Ray some milliseconds after a part is staged.
IN_HAND = 3


@dataclass(frozen=True, slots=True)
class Call:
    """A call that waits for its shard, spooled from the byte `start`."""

    start: int
    size: int
    outcome: Future[Finished | Exception] = field(default_factory=Future)


def spool_path(folder: Folder) -> Folder:
    """Return the path of the file of spooled shards."""
    return folder / temporary_name(SPOOL)


class ShardActor:
    """Embeds the shards that it is called with, one after another."""

    def __init__(self, job: Job, working: str) -> None:
        import torch

        self.job = job
        self.folder = find_folder(job.folder)
        self.stager = Stager(job)
        self.calls: SimpleQueue[Call] = SimpleQueue()
        self.begun: deque[tuple[Call, str]] = deque()  # and the name of the attempt
        self.writer = ThreadPoolExecutor(1, "packvit-stage")
        self.context: EmbedContext | None = None
        self.failure: Exception | None = None
        try:
            with shared(working):
                os.chdir(working)  # relative paths start there
            if job.options.decode == "gpu":
                ask_for_queues()  # processes of this host inherit what the job asked for
            decoders = job.options.decoders()
            decoders.start(job.options.workers)  # while the model is loaded
            device, engine = "cuda" if torch.cuda.is_available() else "cpu", None
            if device == "cuda" and job.options.decode == "gpu":
                engine = begin_engine(torch.device(device))  # while the model is loaded
            encoder = load_alike(job, device)
            self.context = make_context(encoder, job.options, decoders, engine)
        except Exception as error:  # returned at every call: Ray would wrap it in its own error
            self.failure = portable(error)
        threading.Thread(target=self.embed_all, name="packvit-embed", daemon=True).start()

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a shard, pickled: Finished, or the exception."""
        outcome = await asyncio.wrap_future(self.submit(row["start"], row["bytes"]))
        return {"outcome": pickle.dumps(outcome)}

    def submit(self, start: int, size: int) -> Future[Finished | Exception]:
        """Queue a shard; its part is staged once the future has a result."""
        call = Call(start, size)
        self.calls.put(call)
        return call.outcome

    def embed_all(self) -> NoReturn:
        """Embed the shards of all calls."""
        while True:
            coming = take_waiting(self.calls.get(), self.calls)
            try:
                self.embed(coming)
            except Exception as error:
                self.failure = portable(error)  # the job ends with it
            if self.failure:
                for call in (*(call for call, _ in self.begun), *coming):
                    call.outcome.set_result(self.failure)
                self.begun.clear()

    def embed(self, calls: Iterator[Call]) -> None:
        """Embed shards and queue their parts to be staged, unless the actor has failed."""
        if self.failure:
            return
        assert self.context
        for part in embed_shards(
            self.context, self.begin_all(calls), lambda rows: None, self.stager.effort
        ):
            self.writer.submit(self.stage, part, *self.begun.popleft())

    def begin_all(self, calls: Iterator[Call]) -> Iterator[Shard]:
        """Yield the shards of calls, each when an attempt at it begins."""
        for call in calls:
            try:
                with shared(self.job.folder):
                    with spool_path(self.folder).open("rb") as file:
                        file.seek(call.start)
                        shard = pickle.loads(file.read(call.size))
                    attempt = begin_attempt(self.folder, shard.number)
            except Exception as error:
                call.outcome.set_result(portable(error))
                continue
            self.begun.append((call, attempt))
            yield shard

    def stage(self, part: Part, call: Call, attempt: str) -> None:
        """Stage a part, and let its call return."""
        try:
            done: Finished | Exception = self.stager.stage(part, attempt=attempt)
            if isinstance(self.folder, StorePath):  # on a disk it has become the staged part
                attempt_path(self.folder, part.shard.number, attempt).unlink(missing_ok=True)
        except Exception as error:
            done = portable(error)
        call.outcome.set_result(done)


@contextmanager
def shared(folder: str) -> Iterator[None]:
    """Turn an OSError about a folder that all nodes must share into a message for the user."""
    try:
        yield
    except OSError as error:
        raise EmbedderError(
            f"{folder} cannot be used on {socket.gethostname()}: {error.strerror}. All nodes of "
            "the cluster need the job's folder, its photographs and the working folder under the "
            "same paths: put them on a file system that they share."
        ) from error


def begin_attempt(folder: Folder, number: int) -> str:
    """Create the temporary file of an attempt at a part, and return the attempt's name.

    The files of attempts that died remain, which limits their number: Ray itself retries without
    end. An actor that Ray gave up may still be writing, so no two attempts share a file.

    Raises: EmbedderError if `TRIES` attempts were made; OSError.
    """
    for attempt in range(TRIES):
        name = f"{attempt:08x}"
        with suppress(FileExistsError):
            attempt_path(folder, number, name).touch(exist_ok=False)
            return name
    raise EmbedderError(
        f"The actors that embedded {part_name(number)} died {TRIES} times. If memory ran out, ask "
        "for a smaller token_budget; then the same command resumes after what is written."
    )


def attempt_path(folder: Folder, number: int, attempt: str) -> Folder:
    """Return the path of the temporary file of an attempt at a part."""
    return folder / temporary_name(part_name(number), attempt)
