"""The plainest runner: one shard after another, in this process."""

from collections.abc import Generator

from packvit.corpus.decoding import Decoders
from packvit.corpus.folder import Commit
from packvit.corpus.runners.order import Work
from packvit.corpus.settings import Options
from packvit.corpus.shard import run_shards
from packvit.encoder import Encoder


def run_here(
    encoder: Encoder, decoders: Decoders, options: Options, work: Work
) -> Generator[Commit, None, None]:
    """Return what embeds and commits all shards in this process.

    Raises: WriteError if the disk does not take it; DecoderError if no image can be decoded.
    """
    return run_shards(
        encoder,
        work.shards,
        work.folder,
        options,
        work.watch,
        decoders=decoders,
        last=work.last_kept,
        effort=work.effort,
    )
