"""Decode every file of a folder as the embedding job does, and compare with Pillow.

`python -m tests.suites FOLDER ...`, for image suites of other projects, which are not kept here.
Per folder it prints how many files end with each code and, one a line, what a reader should look
at: a file that is called truncated, one that Pillow reads and we refuse or the other way round, one
of other pixels, and a worker that died.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from packvit.config import ImageConfig
from packvit.corpus.decode.prepare import Preprocessing
from packvit.corpus.decode.processes import Worker
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.sources import Input
from packvit.images.decode import FORMATS, decode

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None)
PREPROCESSING = Preprocessing(IMAGES, "hwc", "native", 256, 100_000_000)
PLAIN = frozenset({"RGB", "L", "1"})  # which Pillow converts as we do


def admit(pixels: int) -> None:
    """Let every image be decoded at once."""


def by_pillow(path: Path) -> Image.Image | None:
    """Return what Pillow reads of a file as a photograph, upright, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = Image.open(path, formats=FORMATS)
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.info["mode"] = image.mode
            return turned
        except Exception:  # whatever it raises, it does not read the file
            return None


def remarks(path: Path, row: Row) -> Iterator[str]:
    """Yield what differs between us and Pillow."""
    theirs = by_pillow(path)
    if row.status in ("decoder_crash", "timeout"):
        yield row.status
    elif theirs is None and row.status == "ok":
        yield "Pillow refuses it"
    elif theirs is not None and row.status != "ok":
        yield f"Pillow reads it: {theirs.format} {theirs.info['mode']}"
    elif theirs is not None and theirs.info["mode"] in PLAIN and not theirs.has_transparency_data:
        ours = np.asarray(decode(path.read_bytes()).image)
        if not np.array_equal(ours, np.asarray(theirs.convert("RGB"))):
            yield "other pixels than Pillow's"


def main(folders: list[str]) -> None:
    """Print what becomes of every file of the folders."""
    worker = Worker()
    for folder in folders:
        counts: Counter[str] = Counter()
        lines = []
        for path in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
            if not worker.alive:
                worker = Worker()
            name = str(path.relative_to(folder))
            [prepared], _ = worker.prepare([Input(name, str(path))], PREPROCESSING, admit, 60.0)
            row = prepared.row
            counts[row.status] += 1
            said = [*remarks(path, row)]
            if row.status == "truncated" or said:
                lines.append(f"  {name}: {row.status}, {row.note}; {', '.join(said) or '-'}")
        print(f"{folder}: {sum(counts.values())} files; {dict(counts.most_common())}")
        print("\n".join(lines), flush=True)
    worker.end()


if __name__ == "__main__":
    main(sys.argv[1:])
