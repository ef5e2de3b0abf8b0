"""The simplest runner: one shard after another, in this process."""

from collections.abc import Generator

from packvit.corpus.encode.context import EmbedContext
from packvit.corpus.encode.shard import run_shards
from packvit.corpus.folder.layout import Commit
from packvit.corpus.runners.order import Work


def run_here(context: EmbedContext, work: Work) -> Generator[Commit, None, None]:
    """Embed and commit all shards in this process.

    Raises: WriteError if a part cannot be written; DecoderError if no image can be decoded.
    """
    return run_shards(
        context,
        work.shards,
        work.folder,
        work.watch,
        last=work.last_kept,
        effort=work.effort,
    )
