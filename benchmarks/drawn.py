"""Write a feature folder of drawn vectors: what a finished job writes, without photographs."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from packvit.corpus.folder.layout import commit, write_manifest
from packvit.corpus.folder.names import CURRENT
from packvit.corpus.folder.parts import Outputs, build_table
from packvit.corpus.folder.rows import Row


def write_folder(
    folder: Path, blocks: Iterable[tuple[Sequence[Row], np.ndarray]], width: int, root: str = ""
) -> Path:
    """Write a part for each block of (rows, vectors [rows, D = width]); return the folder."""
    folder.mkdir(parents=True)
    rows_per_part = rows = 0
    for number, (named, vectors) in enumerate(blocks):
        commit(folder, number, build_table(Outputs(width), named, {"pooled": vectors}, {}))
        rows_per_part = rows_per_part or len(named)
        rows += len(named)
    manifest = {
        "format": CURRENT.format,
        "complete": True,
        "model": "drawn",
        "revision": None,
        "weights_sha256": "0" * 64,
        "config": {"width": width},
        "positions": "checkpoint",
        "preprocessing": {"resize": None, "max_patches": None},
        "token_budget": 16384,
        "lists": [],
        "dtype_out": "float16",
        "rows_per_part": rows_per_part,
        "inputs": rows,
        "root": {"path": root, "image_column": "image"},
        "exports": {},
    }
    write_manifest(folder, manifest)
    return folder


def drawn_rows(start: int, stop: int) -> list[Row]:
    """Return rows that are ok, of distinct names, sizes and bytes."""
    plain = Row("", frames=1, rows=16, columns=16, width=640, height=480)
    return [
        replace(plain, id=f"{row // 1000:05d}/{row:09d}.jpg", sha256=f"{row:064x}")
        for row in range(start, stop)
    ]
