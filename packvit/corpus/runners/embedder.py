"""An embedder: a process that loads the job's encoder, embeds shards and stages their parts.

This is the code that host processes and Ray actors share. Each has its own decode workers.
"""

import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from packvit.checkpoints.errors import CheckpointError
from packvit.config import GridPolicy
from packvit.corpus import DecoderError, EmbedderError, StoreError, UsageError, WriteError
from packvit.corpus.encode.filling import Part
from packvit.corpus.folder.layout import Staged, stage
from packvit.corpus.folder.resume import differences
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import find_folder
from packvit.corpus.loading import load_encoder
from packvit.corpus.manifest import describe_job
from packvit.corpus.progress import Effort
from packvit.corpus.settings import EmbedOptions, ModelChoice
from packvit.encoder import Encoder
from packvit.model.options import LoadOptions

Sent = TypeVar("Sent")  # a shard, or what stands for one
# Errors whose message is for the user.
FOR_USERS = (
    *(UsageError, WriteError, StoreError, EmbedderError, DecoderError),
    *(CheckpointError, ImportError),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What an embedder needs to know before its first shard."""

    folder: str
    options: EmbedOptions
    described: Mapping[str, Any]  # all settings that decide what is written
    positions: GridPolicy
    model: str = ""  # the name or folder that embedders load it by
    embedders: int = 1  # that run side by side


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard whose part is staged: the result that an embedder returns."""

    number: int
    staged: Staged
    rows: tuple[Row, ...]
    effort: Effort  # since the shard before


def load_alike(job: Job, device: str) -> Encoder:
    """Return the job's encoder on `device`, checked to give the same numbers as the others.

    Raises: EmbedderError with the differences if weights, packages or anything else here would
    write other numbers; what `load_encoder` raises.
    """
    wanted = job.described  # for a hub model the commit, since a branch may have moved
    options = LoadOptions(
        device=device,
        dtype=wanted["dtype"],
        attention=wanted["attention"],
        positions=job.positions,
        invariant=wanted["invariant"],
    )
    choice = ModelChoice(model=job.model, revision=wanted["revision"], options=options)
    encoder, weights = load_encoder(choice)
    check_alike(job, encoder, weights)
    return encoder


def check_alike(job: Job, encoder: Encoder, weights: str) -> None:
    """Check that an encoder, whose weights have this digest, gives the same numbers as the job's.

    Raises: EmbedderError with the differences.
    """
    found = describe_job(encoder, weights, job.options)
    if lines := differences(job.described, found):
        raise EmbedderError(
            f"An embedder on {socket.gethostname()} would write other numbers than this job. What "
            "differs, the job's -> its own:\n" + "\n".join(f"  {line}" for line in lines) + "\n"
            "Give all of them the same checkpoint, packages and kind of device."
        )


class Stager:
    """Stages an embedder's parts, and measures its effort."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.effort = Effort()
        self.reported = Effort()

    def stage(self, part: Part, *, attempt: str = "") -> Finished:
        """Stage a part, and return the finished shard.

        Raises: WriteError if it cannot be written.
        """
        start, number = time.perf_counter(), part.shard.number
        folder, replaces = find_folder(self.job.folder), part.shard.written is not None
        staged = stage(
            folder, number, part.table(), attempt=attempt, halved=part.halved, replaces=replaces
        )
        self.effort.writing += time.perf_counter() - start
        now = replace(self.effort)
        spent, self.reported = now.since(self.reported, self.job.embedders), now
        return Finished(number, staged, tuple(part.rows), spent)


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process: for users as it is, else its trace."""
    for kind in FOR_USERS:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("In an embedder:\n" + "".join(traceback.format_exception(error)))


def take_waiting(first: Sent, queue: SimpleQueue[Sent]) -> Iterator[Sent]:
    """Yield a shard, as it was sent, and those that are queued behind it, without waiting for more.

    Waiting could deadlock: a shard's last packs stay in flight until another shard follows or the
    iterator ends, and the parent may need that shard before it sends another.
    """
    yield first
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
