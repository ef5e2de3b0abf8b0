"""The plainest runner: one shard after another, in this process."""

from collections.abc import Generator

from packvit.corpus.equipment import Tools
from packvit.corpus.folder import Commit
from packvit.corpus.runners.order import Work
from packvit.corpus.shard import run_shards


def run_here(tools: Tools, work: Work) -> Generator[Commit, None, None]:
    """Return what embeds and commits all shards in this process.

    Raises: WriteError if the disk does not take it; DecoderError if no image can be decoded.
    """
    return run_shards(
        tools,
        work.shards,
        work.folder,
        work.watch,
        last=work.last_kept,
        effort=work.effort,
    )
