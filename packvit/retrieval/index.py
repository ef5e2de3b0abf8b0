"""An approximate index beside the parts: usearch's HNSW, whose recall is measured when it is built.

It records which parts it was built from, and is built again when the log lists others.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packvit.atomic import replacing
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import make_folder, read_log
from packvit.corpus.folder.names import names_of
from packvit.corpus.folder.opening import read_own
from packvit.corpus.folder.stores import Folder, StorePath
from packvit.retrieval.folders import BLOCK, Vectors, unwritable
from packvit.retrieval.nearest import find_nearest

MOST_FACTS = 1 << 16  # bytes
WANTED = 0.99  # recall, for which the search is widened
WIDTHS = (64, 128, 256, 512, 1024)  # candidates that a search keeps: usearch's expansion
SAMPLE, AT = 100, 10  # rows that are looked up to measure recall, and neighbours of each
# Candidates that are compared exactly, for each that is wanted: vectors are kept in bfloat16.
CANDIDATES = 2
INSTALL = "pip install 'packvit[search]'"


@dataclass(frozen=True, slots=True)
class Facts:
    """What an index was built from, and how good it is."""

    log_sha256: str
    rows: int
    expansion: int
    recall: float  # of the AT nearest, mean over SAMPLE rows


def search_index(
    vectors: Vectors, queries: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the cosines and rows of about the `top` nearest of each query, and a note on recall.

    The cosines are exact, and computed from the parts. The index is built if it is missing or of
    other parts.

    Shapes: queries [Q, D] -> float32 [Q, top], int64 [Q, top]; -inf where there are fewer.
    Raises: ImportError with what to install; WriteError if the index cannot be written.
    """
    if isinstance(vectors.folder, StorePath):
        raise UsageError(
            f"`index` needs a local folder, to map it into memory, and {vectors.folder} is in an "
            "object store. Copy the folder, or leave `index` out: then search is exact."
        )
    path, facts = (vectors.folder / name for name in names_of(vectors.folder).index(vectors.column))
    known = read_facts(facts)
    if known is None or not path.is_file() or known.log_sha256 != digest_log(vectors.folder):
        known = build(vectors, path, facts)
        state = "built"
    else:
        state = "used"
    index = usearch().Index.restore(str(path), view=True)
    wanted = min(CANDIDATES * top, len(index))
    index.expansion_search = max(known.expansion, wanted)
    candidates = index.search(queries, wanted).keys.reshape(len(queries), -1).astype(np.int64)
    scores = np.full((len(queries), top), -np.inf, np.float32)
    rows = np.zeros((len(queries), top), np.int64)
    for place, found in enumerate(candidates):
        found = np.sort(found[found < len(vectors)])
        block = vectors.take_vectors(found)
        best, order = find_nearest(queries[place : place + 1], [(0, block)], top, CPU)
        width = min(top, len(found))
        scores[place, :width], rows[place, :width] = best[0, :width], found[order[0, :width]]
    note = (
        f"index {state}: {path}, {known.rows:,} rows, recall at {AT} {known.recall:.3f} "
        f"(mean of {min(SAMPLE, known.rows)} rows, beside the exact search)"
    )
    return scores, rows, note


CPU = torch.device("cpu")


def build(vectors: Vectors, path: Path, facts: Path) -> Facts:
    """Build the index of a column, measure its recall, and write both files."""
    index = usearch().Index(ndim=vectors.width, metric="cos", dtype="bf16")
    for start, block in vectors.blocks():
        good = np.flatnonzero(np.isfinite(block).all(axis=1))
        index.add(good + start, block[good])
    generator = np.random.default_rng(0)
    sample = np.sort(generator.permutation(len(vectors))[:SAMPLE])
    queries = vectors.take_vectors(sample)
    queries = queries[np.isfinite(queries).all(axis=1)]
    _, exact = find_nearest(queries, vectors.blocks(BLOCK), min(AT, len(index)), CPU)
    expansion, recall = WIDTHS[0], 0.0
    for expansion in WIDTHS:
        index.expansion_search = expansion
        wanted = min(CANDIDATES * AT, len(index))
        found = index.search(queries, wanted).keys.reshape(len(queries), -1)
        shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
        recall = sum(shared) / max(1, exact.size)
        if recall >= WANTED:
            break
    known = Facts(digest_log(vectors.folder), len(index), expansion, recall)
    assert isinstance(vectors.folder, Path)
    with unwritable(path):
        make_folder(path.parent)
        with replacing(path, facts, beside=vectors.folder) as (temporary, beside):
            index.save(str(temporary))
            beside.write_text(json.dumps(asdict(known)) + "\n")
    return known


def read_facts(path: Path) -> Facts | None:
    """Return what is known of an index, None if it cannot be read."""
    try:
        return Facts(**json.loads(read_own(path, MOST_FACTS)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def digest_log(folder: Folder) -> str:
    """Return the digest of the log, which names the parts by their contents."""
    return hashlib.sha256(b"".join(read_log(folder))).hexdigest()


def usearch() -> Any:
    """Return usearch's module of indexes.

    Raises: ImportError with what to install.
    """
    try:
        import usearch.index  # pyright: ignore[reportMissingImports] # an extra
    except ImportError as error:
        raise ImportError(
            f"An index needs usearch: {INSTALL}. Without it search is exact."
        ) from error
    return usearch.index
