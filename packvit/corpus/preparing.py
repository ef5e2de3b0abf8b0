"""One input to its row and its patches: what a decode worker does. No torch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from packvit.config import ImageConfig, PatchOrder
from packvit.corpus.rows import Row
from packvit.corpus.sources import Input, read
from packvit.images import ImageError, Stage, decode_opened, open_image
from packvit.preprocessing import to_patches
from packvit.sizes import Resize


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides which patches an image becomes."""

    images: ImageConfig
    order: PatchOrder
    resize: Resize | None
    max_patches: int | None
    max_pixels: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input's row, and its patches [rows * columns, P] where it is not an error."""

    row: Row
    patches: np.ndarray | None = None


# Called with the pixels that a header announces; returns once they may be decoded.
Admit = Callable[[int], None]


def prepare(source: Input, recipe: Recipe, admit: Admit) -> Prepared:
    """Read, decode, resize and cut one input; whatever is wrong with it ends in its row."""
    row = Row(source.id)
    if source.error:
        code, found_in = source.error
        return Prepared(replace(row, status=code, stage=found_in))
    stage: Stage = "read"
    try:
        data = read(source)
        row = replace(row, sha256=hashlib.sha256(data).hexdigest())
        stage = "decode"
        opened = open_image(data, max_pixels=recipe.max_pixels)
        del data  # `opened` holds the bytes, until they are decoded
        admit(opened.pixels)
        photo = decode_opened(opened)
        del opened  # and its pixels, where `photo` has turned or converted ones
        row = replace(row, note=photo.note, width=photo.width, height=photo.height)
        stage = "resize"
        cut = to_patches(
            photo.image,
            recipe.images,
            resize=recipe.resize,
            max_patches=recipe.max_patches,
            patch_order=recipe.order,
        )
    except ImageError as error:
        return Prepared(replace(row, status=error.code, stage=error.stage, note=error.note))
    except MemoryError:
        return Prepared(replace(row, status="out_of_memory", stage=stage, note=None))
    return Prepared(replace(row, frames=1, rows=cut.rows, columns=cut.columns), cut.patches)
