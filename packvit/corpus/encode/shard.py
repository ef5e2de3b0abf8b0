"""From a shard's inputs to its committed part: the unit of work, whoever hands it out.

`run_shards` decodes, encodes and writes at the same time, across the borders of shards;
`embed_shards` leaves the writing to whoever calls it. The table of a part is a function of the
shard's inputs, the encoder and the options alone, so the same shard gives the same bytes again on
the same machine.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.context import Tools
from packvit.corpus.encode.filling import Pack, Part, Shard, Watch, fill_packs
from packvit.corpus.encode.jpegs import Feeder
from packvit.corpus.encode.packs import (
    OUT_OF_MEMORY,
    Encoded,
    Fed,
    Feed,
    Flight,
    encode_halved,
    land,
    launch,
)
from packvit.corpus.folder.layout import Commit, commit
from packvit.corpus.inputs.find import Input
from packvit.corpus.progress import Effort
from packvit.packs.planning import WINDOW

# Packs that a GPU has been given and not given back. A shard's first pack takes as long to fetch as
# one to encode: its images have to be there, and planned.
ALOFT = 2


def run_shards(
    tools: Tools,
    shards: Iterable[Shard],
    folder: Path,
    watch: Watch,
    *,
    last: int = -1,
    effort: Effort | None = None,
) -> Generator[Commit, None, None]:
    """Embed shards, commit their parts to `folder` in their order, and yield their log lines.

    While a shard is embedded, the part before it is written, in a thread of its own. Interrupts
    reach the main thread alone, which then waits for it, so that none can cut it in half. `last` is
    the greatest part that the log has already, -1 for none.

    Raises: WriteError if the disk does not take it; DecoderError if no image can be decoded.
    """
    effort = effort or Effort()

    def write(part: Part) -> Commit:
        start = time.perf_counter()
        number = part.shard.number
        entry = commit(folder, number, part.table(), mends=number < last, halved=part.halved)
        effort.writing += time.perf_counter() - start
        return entry

    with ThreadPoolExecutor(1, "packvit-commit") as writer:
        written: Future[Commit] | None = None
        with closing(embed_shards(tools, shards, watch, effort)) as parts:
            for part in parts:
                if written:
                    yield written.result()  # before the next is begun, which must not come first
                written = writer.submit(write, part)
        if written:
            yield written.result()


def embed_shards(
    tools: Tools, shards: Iterable[Shard], watch: Watch, effort: Effort
) -> Generator[Part, None, None]:
    """Yield the parts of shards in their order, each once all of it is known.

    Images of the next packs and shards are decoded meanwhile, and a GPU is given packs before those
    ahead of them are copied back.
    """
    config, options = tools.encoder.config, tools.options
    listed: deque[Shard] = deque()  # those whose images are being decoded
    unfinished: deque[Part] = deque()

    def inputs() -> Iterator[Input]:
        for shard in shards:
            listed.append(shard)
            yield from shard.inputs

    def packs(prepared: Iterator[Prepared]) -> Iterator[Pack]:
        for first in prepared:
            part = Part.of(listed.popleft(), options.outputs(config.width))
            unfinished.append(part)
            coming = chain([first], islice(prepared, len(part.shard.inputs) - 1))
            yield from fill_packs(part, coming, options.token_budget, watch)

    # What a shard's last packs use up, and one pack more: the next shard's first need not wait.
    ahead = (WINDOW + 1) * options.token_budget * config.patch**2
    with Feeder(tools) as feeder, tools.decoders.line(inputs(), tools.recipe, ahead) as line:
        launcher = Launcher(tools, feeder.feed, watch, effort)
        for pack, fed in feeder.feed_all(packs(line.take())):
            line.let_go(pack.images)
            if pack.images:
                launcher.encode(pack, fed)
            else:
                launcher.catch_up()
            effort.decoding, effort.on_gpu = tools.decoders.spent, tools.decoders.on_gpu
            while unfinished and unfinished[0].settled:
                yield unfinished.popleft()
        launcher.catch_up()
        yield from unfinished


class Launcher:
    """Encodes packs, of which `ALOFT` may be under way while the next is fetched."""

    def __init__(self, tools: Tools, feed: Feed, watch: Watch, effort: Effort) -> None:
        self.tools = tools
        self.feed = feed
        self.watch = watch
        self.effort = effort
        self.aloft: deque[tuple[Pack, Flight]] = deque()

    def encode(self, pack: Pack, fed: Sequence[Fed] | None) -> None:
        """Launch a pack, whose images are `fed` unless memory had no room, and land the oldest."""
        encoder, options = self.tools.encoder, self.tools.options
        self.effort.packs += 1
        self.effort.tokens += sum(image.row.patches for image in pack.images)
        flight = None
        with suppress(*OUT_OF_MEMORY):  # whose frames hold tensors: let go of here
            flight = None if fed is None else launch(encoder, fed, options)
        if flight is None:
            self.catch_up()
            encoded, seconds, pieces = encode_halved(encoder, pack.images, options, self.feed)
            pack.part.halved += pieces > 1
            self.settle(pack, encoded, seconds)
            return
        self.aloft.append((pack, flight))
        self.catch_up(0 if flight.end is None else ALOFT)  # 0: it is here already

    def catch_up(self, aloft: int = 0) -> None:
        """Land packs, oldest first, until so many are under way."""
        while len(self.aloft) > aloft:
            pack, flight = self.aloft.popleft()
            self.settle(pack, *land(flight, self.tools.options.dtype_out))

    def settle(self, pack: Pack, encoded: Sequence[Encoded], seconds: float) -> None:
        """Enter what was said of a pack."""
        self.effort.encoding += seconds
        self.watch(pack.part.take(pack.places, encoded))
