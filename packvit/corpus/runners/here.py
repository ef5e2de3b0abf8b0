"""The plainest runner: one shard after another, in this process."""

from collections.abc import Generator

from packvit.corpus.folder import Commit
from packvit.corpus.runners.order import Work
from packvit.corpus.settings import Options
from packvit.corpus.shard import run_shard
from packvit.encoder import Encoder


def run_here(encoder: Encoder, options: Options, work: Work) -> Generator[Commit, None, None]:
    """Embed and commit one shard after another in this process.

    Raises: WriteError if the disk does not take it.
    """
    for shard in work.shards:
        mends = shard.number < work.last_kept
        yield run_shard(encoder, shard, work.folder, options, work.watch, mends=mends)
