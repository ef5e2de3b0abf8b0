"""Group a shard's prepared images into packs, and collect their features in a part.

Packs are planned from the images' sizes in input order, and hold images of one shard only, so the
same shard always gives the same packs, whichever process decodes the images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from packvit.corpus.decode.prepare import Prepared
from packvit.corpus.encode.packs import Encoded
from packvit.corpus.folder.known import REUSED
from packvit.corpus.folder.layout import reading
from packvit.corpus.folder.parts import Outputs, build_table, read_part, replace_rows
from packvit.corpus.folder.rows import Row
from packvit.corpus.folder.stores import Folder
from packvit.corpus.inputs.sources import Input
from packvit.packs.planning import plan_packs


@dataclass(frozen=True, slots=True)
class Shard:
    """The inputs of one part, in order, and the part's number.

    Of a part that is written already, `inputs` are those at `places`, which are done again.
    """

    number: int
    inputs: tuple[Input, ...]
    written: Folder | None = None
    places: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Part:
    """A shard's rows and features, filled in as packs are encoded.

    Shapes: vectors [N, D] under each name; lists N arrays [tokens, D] under each name, None where
    there are none.
    """

    shard: Shard
    outputs: Outputs
    vectors: dict[str, np.ndarray]
    lists: dict[str, list[np.ndarray | None]]
    rows: list[Row] = field(default_factory=list)
    pending: int = 0  # images that have a row but no features yet
    halved: int = 0  # packs that did not fit in memory

    @classmethod
    def of(cls, shard: Shard, outputs: Outputs) -> "Part":
        """Return an empty part."""
        count = len(shard.inputs)
        kind = outputs.vector_dtype
        vectors = {n: np.zeros((count, width), kind) for n, width in outputs.vectors.items()}
        return cls(shard, outputs, vectors, {name: [None] * count for name in outputs.lists})

    @property
    def settled(self) -> bool:
        """Whether every row and feature is filled in."""
        return len(self.rows) == len(self.shard.inputs) and not self.pending

    def take(self, places: Sequence[int], encoded: Sequence[Encoded]) -> list[Row]:
        """Store the features of the images at `places`, and return their rows."""
        for place, image in zip(places, encoded, strict=True):
            self.rows[place] = image.row
            if image.row.status == "ok":
                for name, vector in image.vectors.items():
                    self.vectors[name][place] = vector
                for name, values in image.lists.items():
                    self.lists[name][place] = values
        self.pending -= len(places)
        return [image.row for image in encoded]

    def table(self) -> pa.Table:
        """Return the table to write."""
        assert [row.id for row in self.rows] == [source.id for source in self.shard.inputs]
        kept = [source.kept for source in self.shard.inputs]
        table = build_table(self.outputs, self.rows, self.vectors, self.lists, kept)
        if self.shard.written is None:
            return table
        with reading(self.shard.written):
            return replace_rows(read_part(self.shard.written), table, self.shard.places)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPack:
    """Prepared images that are encoded together, and their indices in the part."""

    part: Part
    places: Sequence[int]
    images: Sequence[Prepared]


# Called with the rows that were finished since the last call.
Watch = Callable[[Sequence[Row]], None]


# Returns the features of a row that another folder has.
TakeOver = Callable[[Row], Encoded]


def fill_packs(
    part: Part,
    prepared: Iterator[Prepared],
    budget: int,
    watch: Watch,
    take_over: TakeOver | None = None,
) -> Iterator[PreparedPack]:
    """Yield the packs of a shard; one empty pack if none of its images is to be encoded."""
    places: list[int] = []  # the row of each image that is not an error
    waiting: dict[int, Prepared] = {}  # images that wait for their pack, by row

    def lengths() -> Iterator[int]:
        for place, image in enumerate(prepared):
            part.rows.append(image.row)
            if image.row.status == REUSED:
                assert take_over is not None
                part.pending += 1
                watch(part.take([place], [take_over(image.row)]))
                continue
            if image.row.status != "ok":
                watch([image.row])
                continue
            places.append(place)
            part.pending += 1
            waiting[place] = image
            # Where image sizes are unbounded, an image larger than the budget gets its own pack.
            yield min(image.row.patches, budget)

    for pack in plan_packs(lengths(), budget):
        chosen = [places[image] for image in pack]
        yield PreparedPack(part, chosen, [waiting.pop(place) for place in chosen])
    if not places:
        yield PreparedPack(part, (), ())
