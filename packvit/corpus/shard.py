"""From a shard's inputs to its committed part: the unit of work, whoever hands it out.

`run_shards` decodes, encodes and writes at the same time, across the borders of shards;
`embed_shards` leaves the writing to whoever calls it. The table of a part is a function of the
shard's inputs, the encoder and the options alone: packs are planned from the images' sizes, in
the order of the inputs, and hold images of one shard, so the same shard gives the same bytes again
on the same machine.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from packvit.corpus.decoding import Decoders
from packvit.corpus.encoding import OUT_OF_MEMORY, Encoded, Flight, encode_halved, land, launch
from packvit.corpus.folder import Commit, commit
from packvit.corpus.inputs import Input
from packvit.corpus.parts import Outputs, build_table
from packvit.corpus.preparing import Prepared, Recipe
from packvit.corpus.progress import Effort
from packvit.corpus.rows import Row
from packvit.corpus.settings import Options
from packvit.encoder import Encoder
from packvit.packing import WINDOW, plan_packs


@dataclass(frozen=True, slots=True)
class Shard:
    """Inputs that become one part: its number, and its rows in their order."""

    number: int
    inputs: tuple[Input, ...]


@dataclass(slots=True, eq=False)
class Part:
    """A shard's rows and their features, as far as they are known.

    Shapes: pooled [N, D]; lists N arrays [tokens, D] under each name, None where there are none.
    """

    shard: Shard
    outputs: Outputs
    pooled: np.ndarray
    lists: dict[str, list[np.ndarray | None]]
    rows: list[Row] = field(default_factory=list)
    halved: int = 0  # packs that memory had no room for

    @classmethod
    def of(cls, shard: Shard, outputs: Outputs) -> "Part":
        """Return a part of which nothing is known yet."""
        count = len(shard.inputs)
        pooled = np.zeros((count, outputs.width), np.float32)
        return cls(shard, outputs, pooled, {name: [None] * count for name in outputs.lists})

    def take(self, places: Sequence[int], encoded: Sequence[Encoded]) -> list[Row]:
        """Enter what the encoder said of the images at `places`, and return their rows."""
        for place, image in zip(places, encoded, strict=True):
            self.rows[place] = image.row
            if image.row.status == "ok":
                self.pooled[place] = image.pooled
                for name, values in image.lists.items():
                    self.lists[name][place] = values
        return [image.row for image in encoded]

    def table(self) -> pa.Table:
        """Return the rows and features as they are written."""
        assert [row.id for row in self.rows] == [source.id for source in self.shard.inputs]
        return build_table(self.outputs, self.rows, self.pooled, self.lists)


# Called with the rows that are settled since the last call.
Watch = Callable[[Sequence[Row]], None]


def run_shards(
    encoder: Encoder,
    shards: Iterable[Shard],
    folder: Path,
    options: Options,
    watch: Watch,
    *,
    decoders: Decoders,
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
        with closing(embed_shards(encoder, shards, options, watch, decoders, effort)) as parts:
            for part in parts:
                if written:
                    yield written.result()  # before the next is begun, which must not come first
                written = writer.submit(write, part)
        if written:
            yield written.result()


def embed_shards(
    encoder: Encoder,
    shards: Iterable[Shard],
    options: Options,
    watch: Watch,
    decoders: Decoders,
    effort: Effort,
) -> Generator[Part, None, None]:
    """Yield the parts of shards in their order, each once all of it is known.

    Images of the next packs and shards are decoded meanwhile, and a GPU is given a pack before the
    one ahead of it is copied back.
    """
    listed: deque[Shard] = deque()  # those whose images are being decoded

    def inputs() -> Iterator[Input]:
        for shard in shards:
            listed.append(shard)
            yield from shard.inputs

    outputs, budget = options.outputs(encoder.config.width), options.token_budget
    # What a shard's last packs use up, and one pack more: the next shard's first need not wait.
    ahead = (WINDOW + 1) * budget * encoder.config.patch**2
    unfinished: deque[Part] = deque()
    behind: tuple[Part, list[int], Flight] | None = None

    def catch_up() -> None:
        nonlocal behind
        if behind:
            part, places, flight = behind
            behind = None
            encoded, seconds = land(flight, options.dtype_out)
            effort.encoding += seconds
            watch(part.take(places, encoded))

    with closing(decoders.prepare_all(inputs(), recipe(encoder, options), ahead)) as prepared:
        for first in prepared:
            part = Part.of(listed.popleft(), outputs)
            unfinished.append(part)
            coming = chain([first], islice(prepared, len(part.shard.inputs) - 1))
            packs_before = effort.packs
            for places, images in fill_packs(part, coming, budget, watch):
                effort.packs += 1
                effort.tokens += sum(len(i.patches) for i in images if i.patches is not None)
                effort.decoding = decoders.busy / decoders.count
                flight = None
                with suppress(*OUT_OF_MEMORY):  # whose frames hold tensors: let go of here
                    flight = launch(encoder, images, options)
                catch_up()
                if flight is None:
                    encoded, seconds, pieces = encode_halved(encoder, images, options)
                    effort.encoding += seconds
                    part.halved += pieces > 1
                    watch(part.take(places, encoded))
                else:
                    behind = part, places, flight
                    if flight.end is None:  # it is here already
                        catch_up()
                while unfinished[0] is not part:
                    yield unfinished.popleft()
            if effort.packs == packs_before:
                catch_up()
            while unfinished and not behind:
                yield unfinished.popleft()
        catch_up()
        yield from unfinished


def recipe(encoder: Encoder, options: Options) -> Recipe:
    """Return how images become patches for an encoder."""
    return Recipe(
        encoder.images,
        encoder.patch_order,
        options.resize,
        options.max_patches,
        options.max_pixels,
    )


def fill_packs(
    part: Part, prepared: Iterator[Prepared], budget: int, watch: Watch
) -> Iterator[tuple[list[int], list[Prepared]]]:
    """Yield the packs of a shard: the places of their images in the part, and the images."""
    places: list[int] = []  # which row each image is that could be decoded
    waiting: dict[int, Prepared] = {}  # those that wait for their pack, by their rows

    def lengths() -> Iterator[int]:
        for place, image in enumerate(prepared):
            part.rows.append(image.row)
            if image.patches is None:
                watch([image.row])
                continue
            places.append(place)
            waiting[place] = image
            # Where nothing bounds an image, one beyond the budget fills a pack by itself.
            yield min(len(image.patches), budget)

    for pack in plan_packs(lengths(), budget):
        chosen = [places[image] for image in pack]
        yield chosen, [waiting.pop(place) for place in chosen]
