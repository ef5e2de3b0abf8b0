"""`packvit.search`: the photographs of feature folders that are nearest to words or photographs."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from packvit.corpus import UsageError
from packvit.corpus.folder.stores import Folder
from packvit.corpus.inputs.roots import place, recorded_root
from packvit.retrieval.folders import Vectors, open_vectors
from packvit.retrieval.index import search_index
from packvit.retrieval.nearest import choose_device, find_nearest
from packvit.retrieval.queries import Asked, Query, choose_column, embed_queries, read_queries

TOP = 10
ON_GPU = 1 << 16  # rows of a block on a GPU: fewer copies


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that was found: its cosine to the query, its folder, and where its photograph is."""

    id: str
    score: float
    folder: Folder
    path: str  # its id, where the folder does not say where its photographs are


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: for each query its hits, the nearest first."""

    queries: tuple[Query, ...]
    hits: tuple[tuple[Hit, ...], ...]
    rows: int  # that were searched
    image_column: str  # of the Parquet files among the photographs
    notes: tuple[str, ...] = ()  # of the index

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        listed = [
            {
                "query": query.typed,
                "hits": [asdict(hit) | {"folder": str(hit.folder)} for hit in hits],
            }
            for query, hits in zip(self.queries, self.hits, strict=True)
        ]
        return {"rows": self.rows, "queries": listed, "notes": self.notes}


Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def search(
    folder: Folders,
    queries: Asked,
    top: int = TOP,
    *,
    model: str | None = None,
    device: str | None = None,
    root: str | os.PathLike[str] | None = None,
    index: bool = False,
) -> list[tuple[Hit, ...]]:
    """Return the `top` photographs of a feature folder nearest to each query, nearest first.

    A query is words, the path of a photograph, or an image. In a list each begins a query of its
    own, but "+ words" and "- words" are added to the query before them and taken from it, and
    "2:words" counts twice. Nearest means the largest cosine, of all rows, exactly; `index` uses an
    approximate index beside the parts, which is built when it is missing. A photograph of the
    folder is not its own neighbour. Several folders of one model are searched as one, in which a
    file that is in two is found once.

    `model` is where the folder's model is now, if it was moved, and `root` where its photographs
    are. `device` None is a GPU if there is one.

    Raises: UsageError for arguments that cannot be used, or a folder whose job is not finished;
    BrokenQuery for a photograph that cannot be used; CheckpointError.
    """
    found = find(folder, queries, top, model=model, device=device, root=root, index=index)
    return list(found.hits)


def find(
    folder: Folders,
    queries: Asked,
    top: int = TOP,
    *,
    model: str | None = None,
    device: str | None = None,
    root: str | os.PathLike[str] | None = None,
    index: bool = False,
) -> Found:
    """Return what `search` does, with the queries as they were read."""
    if top < 1:
        raise UsageError(f"top is {top}, but must be 1 or more.")
    folders = [folder] if isinstance(folder, (str, os.PathLike)) else list(folder)
    asked = read_queries(queries)
    opened = [open_vectors(one) for one in folders]
    check_one_space(opened)
    column = choose_column(asked, opened[0])
    if column != "pooled":
        opened = [open_vectors(one, column) for one in folders]
    wanted = embed_queries(asked, opened[0], model, device)
    if not np.isfinite(wanted).all() or not np.abs(wanted).max(axis=1).all():
        raise UsageError("A query has no direction: its terms cancel out, or are not finite.")
    most = max(len(query.photos) for query in asked)  # each may be in the folder itself
    hits: list[list[Hit]] = [[] for _ in asked]
    notes: list[str] = []
    for vectors in opened:
        count = min(top + most, len(vectors))
        if index:
            scores, rows, note = search_index(vectors, wanted, count)
            notes.append(note)
        else:
            scores, rows = scan(vectors, wanted, count, device)
        start = find_root(vectors, root)
        for query, mine, near, cosines in zip(asked, hits, rows, scores, strict=True):
            kept = near[np.isfinite(cosines)]
            taken = vectors.take(kept.tolist(), ["id", "sha256"])
            known = {hit.path for hit in mine} if start else set()  # by another folder as well
            for row, score in zip(taken, cosines.tolist(), strict=False):
                path = place(start, row["id"]) if start else row["id"]
                queried = any(is_same(photo, path, row["sha256"]) for photo in query.photos)
                if path not in known and not queried:
                    mine.append(Hit(row["id"], score, vectors.folder, path))
    if not any(hits):
        raise UsageError(f"{opened[0].folder} holds no row with features.")
    ranked = (tuple(sorted(mine, key=lambda hit: -hit.score)[:top]) for mine in hits)
    total = sum(len(vectors) for vectors in opened)
    _, image_column = recorded_root(opened[0].manifest)
    return Found(tuple(asked), tuple(ranked), total, image_column, tuple(notes))


def scan(
    vectors: Vectors, wanted: np.ndarray, count: int, device: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines and rows of the `count` nearest of each query, by one pass over all."""
    where = choose_device(device)
    blocks = vectors.blocks() if where.type == "cpu" else vectors.blocks(ON_GPU)
    return find_nearest(wanted, blocks, count, where)


def find_root(vectors: Vectors, root: str | os.PathLike[str] | None) -> str | None:
    """Return the path that the ids of a folder start from, None if that is not known."""
    if root is not None:
        return os.fspath(root)
    return recorded_root(vectors.manifest)[0]


def is_same(photo: object, path: str, sha256: str) -> bool:
    """Return whether a query's photograph is a row's: the same file, or its bytes if that moved."""
    if not isinstance(photo, (str, os.PathLike)):
        return False
    try:
        if os.path.lexists(path):
            return os.path.samefile(photo, path)
        with open(photo, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except (OSError, ValueError):
        return False


def check_one_space(opened: Sequence[Vectors]) -> None:
    """Refuse folders of different models, whose vectors cannot be compared."""
    first = opened[0]
    for other in opened[1:]:
        if other.manifest["weights_sha256"] != first.manifest["weights_sha256"]:
            raise UsageError(
                f'{first.folder} comes from the model "{first.manifest["model"]}" and '
                f'{other.folder} from "{other.manifest["model"]}", whose vectors cannot be '
                "compared. Search them one at a time."
            )
