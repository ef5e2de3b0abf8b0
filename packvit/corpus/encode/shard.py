"""Embed shards: decode, encode and write their parts.

`run_shards` decodes, encodes and writes at the same time, across shards; `embed_shards` leaves the
writing to its caller. The table of a part depends only on the shard's inputs, the encoder and the
options, so on one machine the same shard always gives the same bytes.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.context import EmbedContext
from packvit.corpus.encode.filling import Part, PreparedPack, Shard, Watch, fill_packs
from packvit.corpus.encode.jpegs import JpegStage
from packvit.corpus.encode.packs import (
    Encoded,
    MakeReady,
    PendingPack,
    Ready,
    collect,
    encode_halved,
    submit,
)
from packvit.corpus.folder.layout import Commit, commit
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import Folder
from packvit.corpus.folder.taking import Taker
from packvit.corpus.inputs.sources import Input
from packvit.corpus.progress import Effort
from packvit.out_of_memory import suppressed
from packvit.packs.planning import WINDOW

# Packs submitted to a GPU and not collected. The first pack of a shard takes about as long to
# prepare as a pack takes to encode, since its images have to be decoded and planned.
PACKS_IN_FLIGHT = 2


def run_shards(
    context: EmbedContext,
    shards: Iterable[Shard],
    folder: Folder,
    watch: Watch,
    *,
    last: int = -1,
    effort: Effort | None = None,
) -> Generator[Commit, None, None]:
    """Embed shards, commit their parts to `folder` in order, and yield their log lines.

    While a shard is embedded, a thread writes the part before it. Interrupts reach the main thread
    only, which waits for that thread, so no write is cut short. `last` is the highest part number
    in the log already, -1 for none.

    Raises: WriteError if the disk does not take it; DecoderError if no image can be decoded.
    """
    effort = effort or Effort()

    def write(part: Part) -> Commit:
        start = time.perf_counter()
        number = part.shard.number
        entry = commit(folder, number, part.table(), mends=number <= last, halved=part.halved)
        effort.writing += time.perf_counter() - start
        return entry

    with ThreadPoolExecutor(1, "packvit-commit") as writer:
        written: Future[Commit] | None = None
        with closing(embed_shards(context, shards, watch, effort)) as parts:
            for part in parts:
                if written:
                    yield written.result()  # before the next write starts: parts go in order
                written = writer.submit(write, part)
        if written:
            yield written.result()


def embed_shards(
    context: EmbedContext, shards: Iterable[Shard], watch: Watch, effort: Effort
) -> Generator[Part, None, None]:
    """Yield the parts of shards in order, each once all its rows are finished.

    Images of the next packs and shards are decoded meanwhile, and packs are submitted to a GPU
    before earlier ones are copied back.
    """
    config, options = context.encoder.config, context.options
    taker = Taker(options.reuse, options.outputs(config)) if options.reuse else None

    def take_over(row: Row) -> Encoded:
        assert taker is not None
        taken = taker.take(row)
        effort.reused += 1
        return Encoded(taken.row, taken.vectors, taken.lists)

    listed: deque[Shard] = deque()  # shards whose images are being decoded
    unfinished: deque[Part] = deque()

    def inputs() -> Iterator[Input]:
        for shard in shards:
            listed.append(shard)
            yield from shard.inputs

    def packs(prepared: Iterator[Prepared]) -> Iterator[PreparedPack]:
        for first in prepared:
            part = Part.of(listed.popleft(), options.outputs(config))
            unfinished.append(part)
            coming = chain([first], islice(prepared, len(part.shard.inputs) - 1))
            yield from fill_packs(part, coming, options.token_budget, watch, take_over)

    # The lookahead of a shard's last packs, and one pack more for the next shard.
    ahead = (WINDOW + 1) * options.token_budget * config.patch**2
    with (
        JpegStage(context) as jpegs,
        context.decoders.queue(inputs(), context.preprocessing, ahead) as queue,
    ):
        encoding = Encoding(context, jpegs.make_ready, watch, effort)
        for pack, ready in jpegs.make_all_ready(packs(queue.take())):
            queue.release(pack.images)
            if pack.images:
                encoding.encode(pack, ready)
            else:
                encoding.catch_up()
            effort.decoding, effort.on_gpu = context.decoders.spent, context.decoders.on_gpu
            while unfinished and unfinished[0].settled:
                yield unfinished.popleft()
        encoding.catch_up()
        yield from unfinished


class Encoding:
    """Encodes packs; up to `PACKS_IN_FLIGHT` are in flight while the next is prepared."""

    def __init__(
        self, context: EmbedContext, make_ready: MakeReady, watch: Watch, effort: Effort
    ) -> None:
        self.context = context
        self.make_ready = make_ready
        self.watch = watch
        self.effort = effort
        self.packs_in_flight: deque[tuple[PreparedPack, PendingPack]] = deque()

    def encode(self, pack: PreparedPack, ready: Sequence[Ready] | None) -> None:
        """Submit a pack, and collect the oldest; `ready` is None if its patches did not fit."""
        encoder, options = self.context.encoder, self.context.options
        self.effort.packs += 1
        self.effort.tokens += sum(image.row.patches for image in pack.images)
        pending = None
        with suppressed():  # its frames hold tensors, which are freed here
            pending = None if ready is None else submit(encoder, ready, options)
        if pending is None:
            self.catch_up()
            encoded, seconds, pieces = encode_halved(encoder, pack.images, options, self.make_ready)
            pack.part.halved += pieces > 1
            self.settle(pack, encoded, seconds)
            return
        self.packs_in_flight.append((pack, pending))
        self.catch_up(0 if pending.end is None else PACKS_IN_FLIGHT)  # 0: it is finished already

    def catch_up(self, packs_in_flight: int = 0) -> None:
        """Collect packs, oldest first, until at most `packs_in_flight` are left."""
        while len(self.packs_in_flight) > packs_in_flight:
            pack, pending = self.packs_in_flight.popleft()
            self.settle(pack, *collect(pending, self.context.options.dtype_out))

    def settle(self, pack: PreparedPack, encoded: Sequence[Encoded], seconds: float) -> None:
        """Store the features of a pack and report its rows."""
        self.effort.encoding += seconds
        self.watch(pack.part.take(pack.places, encoded))
