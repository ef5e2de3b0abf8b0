"""Groups of photographs of a feature folder that are equal in bytes, in pixels, or nearly."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from packvit.corpus import UsageError, no_room_for
from packvit.corpus.folder.stores import Folder
from packvit.corpus.inputs.roots import place, recorded_root
from packvit.images.errors import ImageError
from packvit.retrieval.folders import Vectors, open_vectors
from packvit.retrieval.linkage import group_pairs
from packvit.retrieval.nearest import choose_device
from packvit.retrieval.pairs import Pairs, Tell, find_pairs
from packvit.retrieval.photographs import find_inputs, load_photograph

THRESHOLD = 0.95  # finds what is recompressed, mirrored or cropped a little: benchmarks.duplicates
EQUAL = 1 - 1e-6  # a cosine of equal vectors in float32
Match = Literal["first", "bytes", "pixels", "near"]
Keep = Literal["largest", "first"]


@dataclass(frozen=True, slots=True)
class Member:
    """A photograph of a group: how it is like the group's first, and the cosine to it."""

    id: str
    path: str
    width: int | None
    height: int | None
    match: Match
    score: float


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What was found: groups, the photograph to keep first in each."""

    folder: Folder
    groups: tuple[tuple[Member, ...], ...]
    rows: int
    threshold: float
    unread: int  # photographs that could not be read, whose pixels were not compared
    image_column: str

    @property
    def redundant(self) -> list[Member]:
        """All photographs but the first of each group: those that may be deleted."""
        return [member for group in self.groups for member in group[1:]]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        groups = [[asdict(member) for member in group] for group in self.groups]
        facts = {"folder": str(self.folder), "rows": self.rows, "threshold": self.threshold}
        return facts | {"unread": self.unread, "groups": groups}


def find_duplicates(
    folder: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    keep: Keep = "largest",
    root: str | os.PathLike[str] | None = None,
    pixels: bool = True,
    device: str | None = None,
    tell: Tell = lambda done, rows: None,
) -> Duplicates:
    """Return groups of photographs in which every two are alike; nothing is deleted.

    Alike means equal bytes, or a cosine of `pooled` of at least `threshold`: complete linkage, so
    that a chain of photographs does not become one group. `pixels` says to decode the photographs
    of a group of one size, to tell equal pixels from nearly equal ones. The first of a group is
    the `keep` one: the largest, or the first row.

    Raises: UsageError for a threshold that is no cosine, for too many pairs, and as `search`;
    WriteError if there is no room for the vectors in TMPDIR.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold is {threshold:g}, but must be above 0 and at most 1.")
    where = choose_device(device)
    vectors = open_vectors(folder)
    table = vectors.table(["id", "sha256", "width", "height"])
    leaders = find_equal_bytes(table["sha256"])
    start, image_column = recorded_root(vectors.manifest)
    start = start if root is None else os.fspath(root)
    rows = Rows(table, start)
    with unit_vectors(vectors, leaders) as (unit, kept):
        pairs = find_pairs(unit, min(threshold, EQUAL), where, tell)
        near = Pairs(kept[pairs.left], kept[pairs.right], pairs.scores)
        groups = merge_equal(group_pairs(near), leaders)
        made = [rows.group(group, keep, unit, kept, leaders) for group in groups]
    unread = 0
    if pixels:
        made, unread = compare_pixels(made, image_column)
    return Duplicates(vectors.folder, tuple(made), len(vectors), threshold, unread, image_column)


def find_equal_bytes(digests: pa.ChunkedArray) -> np.ndarray:
    """Return for each row the first one with the same digest; a row without a digest is its own."""
    codes = digests.combine_chunks().dictionary_encode().indices
    found = np.arange(len(codes))
    known = codes.is_valid().to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(
        codes.drop_null().to_numpy(), return_index=True, return_inverse=True
    )
    found[known] = found[known][first[inverse]]
    return found


@contextmanager
def unit_vectors(vectors: Vectors, leaders: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the unit vectors of rows without an equal before them, and which rows they are.

    They are written to a temporary file that memory maps, so that they need not fit in memory.

    Raises: WriteError if there is no room for it.
    """
    kept: list[np.ndarray] = []
    with ExitStack() as opened:
        try:
            file = opened.enter_context(TemporaryFile())
            for start, block in vectors.blocks():
                norms = np.sqrt(np.einsum("nd,nd->n", block, block))
                own = leaders[start : start + len(block)] == np.arange(start, start + len(block))
                good = np.flatnonzero(np.isfinite(norms) & (norms > 0) & own)
                file.write((block[good] / norms[good, None]).astype(np.float32).tobytes())
                kept.append(good + start)
            file.flush()
        except OSError as error:
            raise no_room_for("The vectors could not be written", error.strerror) from error
        rows = np.concatenate(kept)
        shape = (len(rows), vectors.width)
        unit = np.memmap(file, np.float32, "r", shape=shape) if len(rows) else np.empty(shape)
        yield np.asarray(unit, np.float32), rows


def merge_equal(groups: Sequence[Sequence[int]], leaders: np.ndarray) -> list[list[int]]:
    """Add to the groups the rows equal to one of theirs, and groups of rows that are only equal."""
    others: dict[int, list[int]] = {}
    for row in np.flatnonzero(leaders != np.arange(len(leaders))).tolist():
        others.setdefault(int(leaders[row]), []).append(row)
    whole = [
        sorted([*group, *(r for row in group for r in others.pop(row, ()))]) for group in groups
    ]
    return sorted([*whole, *([leader, *rows] for leader, rows in others.items())])


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The names and sizes of a folder's rows."""

    table: pa.Table
    root: str | None

    def group(
        self,
        rows: list[int],
        keep: Keep,
        unit: np.ndarray,
        kept: np.ndarray,
        leaders: np.ndarray,
    ) -> tuple[Member, ...]:
        """Return the members of a group: first the one to keep, then the others in order."""
        plain = self.table.take(pa.array(rows)).to_pylist()
        sizes = [(each["width"] or 0) * (each["height"] or 0) for each in plain]
        first = sizes.index(max(sizes)) if keep == "largest" else 0
        at = np.searchsorted(kept, leaders[rows])
        known = at < len(kept)
        known[known] = kept[at[known]] == leaders[rows][known]  # not of those without a vector
        scores = np.ones(len(rows), np.float32)
        if known[first]:
            scores[known] = unit[at[known]] @ unit[at[first]]
        members = []
        for index, each in enumerate(plain):
            equal = leaders[rows[index]] == leaders[rows[first]]
            path = place(self.root, each["id"]) if self.root else each["id"]
            match: Match = "first" if index == first else "bytes" if equal else "near"
            score = 1.0 if equal else float(scores[index])
            size = (each["width"], each["height"])
            members.append(Member(each["id"], path, *size, match, score))
        return (members[first], *members[:first], *members[first + 1 :])


def compare_pixels(
    groups: Sequence[tuple[Member, ...]], image_column: str
) -> tuple[list[tuple[Member, ...]], int]:
    """Return groups with the members marked whose pixels are the first's, and how many are unread.

    Only photographs of the first's size are read.
    """
    made, unread = [], 0
    for group in groups:
        first, *others = group
        size = (first.width, first.height)
        alike = [
            each for each in others if each.match == "near" and (each.width, each.height) == size
        ]
        digests: dict[str, bytes | None] = {}
        inputs = find_inputs([each.path for each in (first, *alike)], image_column) if alike else {}
        for path, one in inputs.items():
            try:
                digests[path] = hashlib.sha256(load_photograph(one).tobytes()).digest()
            except ImageError:
                digests[path] = None
                unread += 1
        same = digests.get(first.path)
        made.append(
            (
                first,
                *(
                    replace(each, match="pixels")
                    if each.match == "near" and same and digests.get(each.path) == same
                    else each
                    for each in others
                ),
            )
        )
    return made, unread
