"""What a worker does, wherever it runs: load the job's encoder, embed shards, stage their parts."""

import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packvit.checkpoints import CheckpointError
from packvit.corpus import WorkerError, WriteError, WrongUse
from packvit.corpus.folder import Staged, stage
from packvit.corpus.resume import differences
from packvit.corpus.rows import Row
from packvit.corpus.settings import Options, describe, load_encoder
from packvit.corpus.shard import Shard, embed_shard
from packvit.encoder import Encoder, GridPolicy

TOLD = (WrongUse, WriteError, WorkerError, CheckpointError, ImportError)  # sentences for users


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told before its first shard."""

    folder: str
    options: Options
    described: Mapping[str, Any]  # the encoder and all else that decides what is written
    positions: GridPolicy
    model: str = ""  # the name or folder that workers load it by


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard whose part is staged: what a worker brings back."""

    number: int
    staged: Staged
    rows: tuple[Row, ...]


def prepare(job: Job, device: str) -> Encoder:
    """Return the job's encoder on `device`, certain to write what any other worker would.

    Raises: WorkerError with the differences if weights, packages or anything else here would write
    other numbers; what `load_encoder` raises.
    """
    wanted = job.described  # of a hub's model, the commit: a branch may have moved meanwhile
    dtype, attention, revision = (wanted[name] for name in ("dtype", "attention", "revision"))
    encoder = load_encoder(job.model, device, dtype, attention, revision, job.positions)
    assert encoder.checkpoint
    found = describe(encoder, encoder.checkpoint.sha256(), job.options)
    if lines := differences(wanted, found):
        raise WorkerError(
            f"A worker on {socket.gethostname()} would write other numbers than this job. What "
            "differs, the job's -> its:\n" + "\n".join(f"  {line}" for line in lines) + "\n"
            "Give all workers the same checkpoint, packages and kind of device."
        )
    return encoder


def finish(encoder: Encoder, shard: Shard, job: Job, *, attempt: str = "") -> Finished:
    """Embed a shard and stage its part.

    Raises: WriteError if the disk does not take it.
    """
    rows: dict[str, Row] = {}
    table = embed_shard(
        encoder, shard.inputs, job.options, lambda new: rows.update((row.id, row) for row in new)
    )
    staged = stage(Path(job.folder), shard.number, table, attempt=attempt)
    return Finished(shard.number, staged, tuple(rows[source.id] for source in shard.inputs))


def portable(error: Exception) -> Exception:
    """Return an error as another process can raise it: a user's as it is, a bug with its trace."""
    for kind in TOLD:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError("In a worker:\n" + "".join(traceback.format_exception(error)))
