"""How many bytes a job will write, and whether its disk has room. No torch."""

import math
import shutil

import numpy as np

from packvit.corpus.folder.parts import Outputs
from packvit.corpus.folder.stores import Folder, StorePath

PLAIN = 120  # bytes of a row beside its features: mostly the id and the sha256
WORTH_SAYING = 100_000_000  # bytes


def row_bytes(outputs: Outputs, patches: int) -> int:
    """Return about how many bytes the row of an image of `patches` patches takes."""
    vectors = sum(outputs.vectors.values()) * np.dtype(outputs.vector_dtype).itemsize
    lists = len(outputs.lists) * outputs.width * np.dtype(outputs.dtype_out).itemsize
    return PLAIN + vectors + patches * lists


def describe_size(folder: Folder, rows: int, each: int) -> tuple[str, ...]:
    """Return a note on the space that `rows` rows take, unless it is little and there is room."""
    if isinstance(folder, StorePath):
        return ()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(existing).free, rows * each
    if not needed or needed < min(WORTH_SAYING, free / 2):
        return ()
    said = f"{rows:,} rows of about {in_units(each)} take {in_units(needed)}; the disk has "
    room = f"{in_units(free)} free."
    return (said + room + (" They will not fit." if needed > free else ""),)


def in_units(count: float | int) -> str:
    """Return bytes as text: 3.2 kB, 47 GB."""
    power = min(5, max(0, int(math.log10(max(1, count)) // 3)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
