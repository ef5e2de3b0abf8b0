"""An embedder: a process that loads the job's encoder, embeds shards and stages their parts.

This is what it does wherever it runs. Each has decode workers of its own, for as long as it lives.
"""

import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packvit.checkpoints.errors import CheckpointError
from packvit.config import GridPolicy
from packvit.corpus import DecoderError, EmbedderError, WriteError, WrongUse
from packvit.corpus.encode.filling import Part
from packvit.corpus.folder.layout import Staged, stage
from packvit.corpus.folder.resume import differences
from packvit.corpus.folder.rows import Row
from packvit.corpus.progress import Effort
from packvit.corpus.settings import Options, describe, load_encoder
from packvit.encoder import Encoder

# Sentences for users.
TOLD = (WrongUse, WriteError, EmbedderError, DecoderError, CheckpointError, ImportError)


@dataclass(frozen=True, slots=True)
class Job:
    """What an embedder is told before its first shard."""

    folder: str
    options: Options
    described: Mapping[str, Any]  # the encoder and all else that decides what is written
    positions: GridPolicy
    model: str = ""  # the name or folder that embedders load it by
    embedders: int = 1  # that run side by side


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard whose part is staged: what an embedder brings back."""

    number: int
    staged: Staged
    rows: tuple[Row, ...]
    effort: Effort  # since the shard before


def load_alike(job: Job, device: str) -> Encoder:
    """Return the job's encoder on `device`, certain to write what any other embedder would.

    Raises: EmbedderError with the differences if weights, packages or anything else here would
    write other numbers; what `load_encoder` raises.
    """
    wanted = job.described  # of a hub's model, the commit: a branch may have moved meanwhile
    dtype, attention, revision = (wanted[name] for name in ("dtype", "attention", "revision"))
    encoder = load_encoder(job.model, device, dtype, attention, revision, job.positions)
    assert encoder.checkpoint
    found = describe(encoder, encoder.checkpoint.sha256(), job.options)
    if lines := differences(wanted, found):
        raise EmbedderError(
            f"An embedder on {socket.gethostname()} would write other numbers than this job. What "
            "differs, the job's -> its:\n" + "\n".join(f"  {line}" for line in lines) + "\n"
            "Give all of them the same checkpoint, packages and kind of device."
        )
    return encoder


class Stager:
    """Stages an embedder's parts, and counts what it spends."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.effort = Effort()
        self.told = Effort()

    def stage(self, part: Part, *, attempt: str = "") -> Finished:
        """Stage a part, and return what became of its shard.

        Raises: WriteError if the disk does not take it.
        """
        start, number = time.perf_counter(), part.shard.number
        folder = Path(self.job.folder)
        staged = stage(folder, number, part.table(), attempt=attempt, halved=part.halved)
        self.effort.writing += time.perf_counter() - start
        now = replace(self.effort)
        spent, self.told = now.since(self.told, self.job.embedders), now
        return Finished(number, staged, tuple(part.rows), spent)


def portable(error: Exception) -> Exception:
    """Return an error as another process can raise it: a user's as it is, a bug with its trace."""
    for kind in TOLD:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("In an embedder:\n" + "".join(traceback.format_exception(error)))
