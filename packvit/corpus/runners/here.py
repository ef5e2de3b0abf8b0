"""The plainest runner: one shard after another, in this process."""

from collections.abc import Generator

from packvit.corpus.encode.context import Tools
from packvit.corpus.encode.shard import run_shards
from packvit.corpus.folder.layout import Commit
from packvit.corpus.runners.order import Work


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
