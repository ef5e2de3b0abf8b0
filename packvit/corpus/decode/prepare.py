"""What a decode worker does: turn one input into its row and patches, or a JPEG for the GPU.

No torch.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from packvit.corpus.folder.known import REUSED, find_trusted, is_known
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.sources import Input, read
from packvit.corpus.inputs.unpacking import Spent
from packvit.gpu.jpeg import JpegPlan, plan_jpeg
from packvit.images.decode import decode_opened, open_image
from packvit.images.drafts import draft
from packvit.images.errors import ImageError, Stage
from packvit.images.patches import Cutting

# What decodes JPEGs: Pillow; Pillow, large ones as drafts; the GPU. Pillow decodes all others.
Decode = Literal["pil", "fast", "gpu"]


@dataclass(frozen=True, slots=True)
class Preprocessing(Cutting):
    """All settings that decide which patches an image becomes."""

    max_pixels: int
    decode: Decode = "pil"
    known: str | None = None  # the index of the rows that may be taken over


@dataclass(frozen=True, slots=True)
class JpegFile:
    """A JPEG for the GPU: its bytes, the plan, and its input, in case the GPU refuses it."""

    data: bytes | np.ndarray
    plan: JpegPlan
    source: Input


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An input's row and, unless that is an error, its patches or its JPEG.

    Shapes: patches uint8 [rows * columns, P].
    """

    row: Row
    patches: np.ndarray | None = None
    jpeg: JpegFile | None = None


# Called with the pixels that a header declares; returns once they may be decoded.
Admit = Callable[[int], None]


def prepare(
    source: Input,
    preprocessing: Preprocessing,
    admit: Admit,
    *,
    pause: Callable[[float], None] = time.sleep,
    spent: Spent = lambda seconds: None,
    alone: bool = False,
) -> Prepared:
    """Read, decode, resize and cut one input; an error is recorded in its row.

    `pause`, `spent` and `alone` are as `read` takes them.
    """
    row = Row(source.id)
    if source.error:
        code, found_in = source.error
        return Prepared(replace(row, status=code, stage=found_in))
    if preprocessing.known and (sha256 := find_trusted(preprocessing.known, source)):
        return Prepared(replace(row, status=REUSED, sha256=sha256))
    stage: Stage = "read"
    try:
        data = read(source, pause=pause, spent=spent, alone=alone)
        sha256 = hashlib.sha256(data).hexdigest()
        row = replace(row, sha256=sha256)
        if preprocessing.known and is_known(preprocessing.known, sha256):
            return Prepared(replace(row, status=REUSED))
        stage = "decode"
        if preprocessing.decode == "gpu":
            plan = plan_jpeg(
                data,
                preprocessing.images,
                resize=preprocessing.resize,
                max_patches=preprocessing.max_patches,
                max_pixels=preprocessing.max_pixels,
            )
            if isinstance(plan, JpegPlan):
                return Prepared(planned(row, plan), jpeg=JpegFile(data, plan, source))
        opened = open_image(data, max_pixels=preprocessing.max_pixels)
        del data  # `opened` holds the bytes, until they are decoded
        admit(opened.pixels)
        whole = draft(opened, preprocessing) if preprocessing.decode == "fast" else None
        photo = decode_opened(opened)
        del opened  # frees its pixels if `photo` has rotated or converted ones
        shown = whole or photo
        row = replace(row, note=photo.note, width=shown.width, height=shown.height)
        stage = "resize"
        cut = preprocessing.cut(photo.image, whole)
    except ImageError as error:
        return Prepared(replace(row, status=error.code, stage=error.stage, note=error.note))
    except MemoryError:
        return Prepared(replace(row, status="out_of_memory", stage=stage, note=None))
    return Prepared(replace(row, frames=1, rows=cut.rows, columns=cut.columns), cut.patches)


def planned(row: Row, plan: JpegPlan) -> Row:
    """Return the row of a JPEG with the sizes it will have once decoded."""
    height, width = plan.jpeg.upright
    size = plan.size
    return replace(row, width=width, height=height, frames=1, rows=size.rows, columns=size.columns)
