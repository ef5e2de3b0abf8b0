"""A shard's images as they come, to the packs that they are encoded in and the part they end in.

Packs are planned from the images' sizes, in the order of the inputs, and hold images of one shard,
so the same shard gives the same packs again, whoever decodes them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.packs import Encoded
from packvit.corpus.folder.parts import Outputs, build_table
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.find import Input
from packvit.packs.planning import plan_packs


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
    pending: int = 0  # images whose rows are there and whose features are not
    halved: int = 0  # packs that memory had no room for

    @classmethod
    def of(cls, shard: Shard, outputs: Outputs) -> "Part":
        """Return a part of which nothing is known yet."""
        count = len(shard.inputs)
        pooled = np.zeros((count, outputs.width), np.float32)
        return cls(shard, outputs, pooled, {name: [None] * count for name in outputs.lists})

    @property
    def settled(self) -> bool:
        """Whether all of it is known."""
        return len(self.rows) == len(self.shard.inputs) and not self.pending

    def take(self, places: Sequence[int], encoded: Sequence[Encoded]) -> list[Row]:
        """Enter what the encoder said of the images at `places`, and return their rows."""
        for place, image in zip(places, encoded, strict=True):
            self.rows[place] = image.row
            if image.row.status == "ok":
                self.pooled[place] = image.pooled
                for name, values in image.lists.items():
                    self.lists[name][place] = values
        self.pending -= len(places)
        return [image.row for image in encoded]

    def table(self) -> pa.Table:
        """Return the rows and features as they are written."""
        assert [row.id for row in self.rows] == [source.id for source in self.shard.inputs]
        return build_table(self.outputs, self.rows, self.pooled, self.lists)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Images of a part that are encoded together, and their places in it."""

    part: Part
    places: Sequence[int]
    images: Sequence[Prepared]


# Called with the rows that are settled since the last call.
Watch = Callable[[Sequence[Row]], None]


def fill_packs(
    part: Part, prepared: Iterator[Prepared], budget: int, watch: Watch
) -> Iterator[Pack]:
    """Yield the packs of a shard; for a shard of errors alone one without images."""
    places: list[int] = []  # which row each image is that is no error
    waiting: dict[int, Prepared] = {}  # those that wait for their pack, by their rows

    def lengths() -> Iterator[int]:
        for place, image in enumerate(prepared):
            part.rows.append(image.row)
            if image.row.status != "ok":
                watch([image.row])
                continue
            places.append(place)
            part.pending += 1
            waiting[place] = image
            # Where nothing bounds an image, one beyond the budget fills a pack by itself.
            yield min(image.row.patches, budget)

    for pack in plan_packs(lengths(), budget):
        chosen = [places[image] for image in pack]
        yield Pack(part, chosen, [waiting.pop(place) for place in chosen])
    if not places:
        yield Pack(part, (), ())
