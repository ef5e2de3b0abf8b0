"""Search, duplicates and labels of a large feature folder, beside faiss-cpu and usearch.

python -m benchmarks.retrieval --work FOLDER [--rows 1000000] [--width 768] > \
    benchmarks/results/retrieval-cpu.json; python -m docs.generate

Vectors are drawn, ids are paths. Variances fall as those of features do, the first direction's 768
times the last's, around a common direction. One in a hundred rows is a noisy copy of one of the
part before it (cosine 0.98). Every contender runs in a process of its own, so that its peak memory
is its own: `owned` is what it allocated, `resident` adds the pages of mapped files, which the
system takes back when it needs them. Times are medians of rounds within that process, files in the
page cache for all. faiss and usearch get a NumPy matrix of unit vectors; faiss is asked for the
pairs of some rows with all, and what all rows would take is that, times their share. The index is
of fewer rows, since building one takes long. A million rows take about 10 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.drawn import drawn_rows, write_folder
from packvit.bench.measuring import where
from packvit.version import version_of

PART, TOP, LABELS = 1024, 10, 1000
ROUNDS = 3
COPIES = PART // 100
THRESHOLD = 0.95
SEED_ROWS = 1 << 16  # rows that are drawn at once
PEER_ROWS = 2000  # whose pairs peers are asked for
INDEX_ROWS = 50_000
Contender = Callable[[Path], dict[str, Any]]


def draw(rows: int, width: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield parts of rows and vectors with a common direction, and noisy copies."""
    generator = np.random.default_rng(0)
    spread = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    before = np.empty((0, width), np.float32)
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        vectors = generator.standard_normal((count, width), np.float32) * spread
        vectors[:, 0] += 1.0
        noise = generator.standard_normal((COPIES, width), np.float32) * spread
        copied = before[COPIES : 2 * COPIES]
        vectors[: len(copied)] = copied[:count] + 0.2 * noise[: len(copied)]
        before = vectors
        yield drawn_rows(start, start + count), vectors


def prepare(folder: Path, rows: int, width: int) -> None:
    """Write the folder, and its matrix for peers, unless they are there."""
    if folder.exists():
        return
    write_folder(folder, draw(rows, width), width)
    from packvit.retrieval.folders import open_vectors

    matrix = np.lib.format.open_memmap(folder.with_suffix(".npy"), "w+", np.float32, (rows, width))
    for start, block in open_vectors(folder).blocks():
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        matrix[start : start + len(block)] = block / norms
    matrix.flush()


def unit_matrix(folder: Path) -> np.ndarray:
    """Return the peers' matrix, memory-mapped."""
    return np.load(folder.with_suffix(".npy"), mmap_mode="r")


def queries_of(folder: Path, count: int) -> np.ndarray:
    """Return noisy rows."""
    matrix = unit_matrix(folder)
    rows = np.linspace(0, len(matrix) - 1, count).astype(np.int64)
    noise = np.random.default_rng(1).standard_normal((count, matrix.shape[1]), np.float32)
    return matrix[rows] + 0.5 * noise / matrix.shape[1] ** 0.5


def timed(call: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """Return the median seconds of some rounds after a first, and what the last returned."""
    result, taken = call(), []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        taken.append(time.perf_counter() - start)
    return median(taken), result


def search_ours(folder: Path) -> dict[str, Any]:
    """Our pass over the parts."""
    from packvit.retrieval.folders import open_vectors
    from packvit.retrieval.search import scan

    vectors = open_vectors(folder)
    one, many = queries_of(folder, 1), queries_of(folder, 100)
    seconds, (_, rows) = timed(lambda: scan(vectors, one, TOP, "cpu"))
    seconds_many, _ = timed(lambda: scan(vectors, many, TOP, "cpu"), 1)
    return {"one_query_s": seconds, "hundred_queries_s": seconds_many, "rows": rows.tolist()}


def search_ours_matrix(folder: Path) -> dict[str, Any]:
    """Our pass over an exported matrix: the peers' file."""
    from packvit.retrieval.nearest import choose_device, find_nearest

    matrix, device = unit_matrix(folder), choose_device("cpu")
    one, many = queries_of(folder, 1), queries_of(folder, 100)

    def scan(queries: np.ndarray) -> Any:
        blocks = ((i, np.asarray(matrix[i : i + 4096])) for i in range(0, len(matrix), 4096))
        return find_nearest(queries, blocks, TOP, device)

    seconds, (_, rows) = timed(lambda: scan(one))
    seconds_many, _ = timed(lambda: scan(many), 1)
    return {"one_query_s": seconds, "hundred_queries_s": seconds_many, "rows": rows.tolist()}


def search_index(folder: Path) -> dict[str, Any]:
    """Our index: usearch's HNSW beside the parts, built anew."""
    from packvit.corpus.folder.names import names_of
    from packvit.retrieval.folders import open_vectors
    from packvit.retrieval.index import search_index

    vectors, one = open_vectors(folder), queries_of(folder, 1)
    for name in names_of(folder).index(vectors.column):
        (folder / name).unlink(missing_ok=True)
    start = time.perf_counter()
    note = search_index(vectors, one, TOP)[2].split(", ", 1)[1]
    built = time.perf_counter() - start
    seconds, (_, rows, _) = timed(lambda: search_index(vectors, one, TOP))
    return {"build_s": built, "one_query_s": seconds, "rows": rows.tolist(), "note": note}


def search_faiss(folder: Path) -> dict[str, Any]:
    """faiss's flat index, which holds all vectors in memory."""
    import faiss  # pyright: ignore[reportMissingImports] # a peer, installed for this alone

    start = time.perf_counter()
    matrix = unit_matrix(folder)
    index = faiss.IndexFlatIP(matrix.shape[1])
    for first in range(0, len(matrix), SEED_ROWS):
        index.add(np.ascontiguousarray(matrix[first : first + SEED_ROWS]))
    loaded = time.perf_counter() - start
    one, many = queries_of(folder, 1), queries_of(folder, 100)
    seconds, (_, rows) = timed(lambda: index.search(one, TOP))
    seconds_many, _ = timed(lambda: index.search(many, TOP), 1)
    return {
        "load_s": loaded,
        "one_query_s": seconds,
        "hundred_queries_s": seconds_many,
        "rows": rows.tolist(),
    }


def search_usearch(folder: Path) -> dict[str, Any]:
    """usearch's exact search over the mapped matrix."""
    from usearch.index import search  # pyright: ignore[reportMissingImports] # a peer

    matrix = unit_matrix(folder)
    one, many = queries_of(folder, 1), queries_of(folder, 100)
    seconds, found = timed(lambda: search(matrix, one, TOP, "ip", exact=True))
    seconds_many, _ = timed(lambda: search(matrix, many, TOP, "ip", exact=True), 1)
    rows = np.asarray(found.keys).reshape(1, -1).tolist()
    return {"one_query_s": seconds, "hundred_queries_s": seconds_many, "rows": rows}


def dups_ours(folder: Path) -> dict[str, Any]:
    """All pairs of all rows, and their groups."""
    from packvit.retrieval.duplicates import find_duplicates

    start = time.perf_counter()
    found = find_duplicates(folder, threshold=THRESHOLD, pixels=False, device="cpu")
    return {"s": time.perf_counter() - start, "groups": len(found.groups)}


def dups_faiss(folder: Path) -> dict[str, Any]:
    """faiss's range search of some rows over a flat index of all."""
    import faiss  # pyright: ignore[reportMissingImports] # a peer

    matrix = unit_matrix(folder)
    index = faiss.IndexFlatIP(matrix.shape[1])
    for first in range(0, len(matrix), SEED_ROWS):
        index.add(np.ascontiguousarray(matrix[first : first + SEED_ROWS]))
    asked = np.ascontiguousarray(matrix[:PEER_ROWS])
    start = time.perf_counter()
    limits, _, _ = index.range_search(asked, THRESHOLD)
    seconds = time.perf_counter() - start
    share = PEER_ROWS / len(matrix)
    return {"s_of_first_rows": seconds, "s_of_all": seconds / share, "pairs": int(limits[-1])}


def zeroshot_ours(folder: Path) -> dict[str, Any]:
    """The table of labels of all rows."""
    from packvit.config import TextConfig
    from packvit.retrieval.folders import open_vectors
    from packvit.retrieval.zeroshot import write_labels
    from packvit.text.encoder import TextEncoder

    vectors, labels = open_vectors(folder), [f"label {number}" for number in range(LABELS)]
    config = TextConfig(
        width=8,
        layers=1,
        heads=1,
        mlp_width=8,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        vocabulary=8,
        positions=8,
    )  # what it is made of plays no part: the labels' vectors are drawn
    classes = torch.from_numpy(queries_of(folder, LABELS))
    classes = torch.nn.functional.normalize(classes, dim=1)
    out = folder.with_suffix(".labels.parquet")
    start = time.perf_counter()
    found = write_labels(vectors, TextEncoder(config), labels, classes, out)
    return {"s": time.perf_counter() - start, "rows": found.rows, "bytes": out.stat().st_size}


def zeroshot_faiss(folder: Path) -> dict[str, Any]:
    """faiss: the best label of each row, without scores of the others and without a table."""
    import faiss  # pyright: ignore[reportMissingImports] # a peer

    matrix = unit_matrix(folder)
    index = faiss.IndexFlatIP(matrix.shape[1])
    classes = queries_of(folder, LABELS)
    index.add(classes / np.linalg.norm(classes, axis=1, keepdims=True))
    start = time.perf_counter()
    for first in range(0, len(matrix), SEED_ROWS):
        index.search(np.ascontiguousarray(matrix[first : first + SEED_ROWS]), 1)
    return {"s": time.perf_counter() - start}


CONTENDERS: dict[str, Contender] = {
    "search: ours, over the parts": search_ours,
    "search: ours, over a mapped matrix": search_ours_matrix,
    "search: faiss flat": search_faiss,
    "search: usearch exact": search_usearch,
    "zeroshot: ours, with scores and table": zeroshot_ours,
    "zeroshot: faiss, best label alone": zeroshot_faiss,
    "dups: ours": dups_ours,
    "dups: faiss range search": dups_faiss,
    "index: ours, search --index": search_index,
}


def memory_bytes(name: str) -> int:
    """Return an entry of what Linux says of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def run_one(name: str, folder: Path) -> None:
    """Run a contender in this process; print what it found, and its peak memory."""
    most, done = [memory_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], memory_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = CONTENDERS[name](folder)
    finally:
        done.set()
        watcher.join()
    resident = memory_bytes("VmHWM") / 2**30
    memory = {"owned_gib": most[0] / 2**30, "resident_gib": resident}
    print(json.dumps({name: found | memory}))


def main() -> None:
    """Print one JSON object with machine, versions and results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--match", default="", help="run contenders whose names hold this")
    parser.add_argument("--only", choices=CONTENDERS, help="run one, in this process")
    asked = parser.parse_args()
    asked.work.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for name in CONTENDERS if asked.only is None else (asked.only,):
        if asked.match not in name:
            continue
        rows = min(INDEX_ROWS, asked.rows) if name.startswith("index") else asked.rows
        folder = asked.work / f"{rows}x{asked.width}"
        prepare(folder, rows, asked.width)
        if asked.only:
            run_one(name, folder)
            return
        command = [sys.executable, "-m", "benchmarks.retrieval", "--only", name]
        command += ["--work", asked.work, "--rows", str(asked.rows), "--width", str(asked.width)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results |= json.loads(done.stdout.splitlines()[-1])
        shown = {k: v for k, v in results[name].items() if k != "rows"}
        print(name, shown, file=sys.stderr, flush=True)
    workload = {
        "rows": asked.rows,
        "width": asked.width,
        "peer_rows": min(PEER_ROWS, asked.rows),
        "index_rows": min(INDEX_ROWS, asked.rows),
        "labels": LABELS,
        "threads": torch.get_num_threads(),
    }
    peers = {name: version_of(name) for name in ("faiss-cpu", "usearch")}
    facts = where() | peers | {"workload": workload, "results": results}
    json.dump(facts, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
