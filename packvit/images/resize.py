"""The size an image is resized to, so that it falls into patches: the references' own, or native.

Source: transformers 5.17, image_transforms.py, models/siglip2/image_processing_pil_siglip2.py and
models/qwen2_vl/image_processing_pil_qwen2_vl.py, for the checkpoints' sizes and the arithmetic that
leads to them. Plain Python on plain ints.
"""

from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import Literal

from packvit.config import Exact, ImageConfig, MostPatches, PaddedPatches, PixelRange, ShortestEdge
from packvit.images.decode import MAX_PIXELS
from packvit.images.errors import ImageError

Resize = Literal["checkpoint", "native"]

NATIVE_MOST_PATCHES = 1024
MOST_ASPECT = 200  # the longer side by the shorter one, that a `PixelRange` takes


@dataclass(frozen=True, slots=True)
class SizePlan:
    """Resize to `height` x `width`, cut out `crop` (top, left, height, width), then patches.

    Units: pixels; `rows` and `columns` count patches. Pixels right of the last column and below the
    last row are dropped, as the references' convolutions drop them; where there are fewer, black
    ones fill them up.
    """

    height: int
    width: int
    crop: tuple[int, int, int, int] | None
    rows: int
    columns: int


def resize_plan(
    height: int,
    width: int,
    config: ImageConfig,
    *,
    resize: Resize | None = None,
    max_patches: int | None = None,
) -> SizePlan:
    """Plan what becomes of an image of `height` x `width` pixels; no pixel is touched.

    "checkpoint" is the checkpoint's own preprocessing. "native" keeps the aspect ratio, rounds each
    side to the nearest multiple of the patch, or of a merger's square of patches, and shrinks to
    `max_patches` (default 1024), but never enlarges. None is "checkpoint" where that defines a
    size, else "native".

    Raises: ImageError aspect_ratio for an image that cannot be brought to patches so; ValueError
    for options that contradict each other.
    """
    if resize not in (None, "checkpoint", "native"):
        raise ValueError(f'resize is {resize!r}. Choose "checkpoint", "native" or None.')
    fewest = config.multiple**2
    if max_patches is not None and max_patches < fewest:
        needed = f"{fewest} patches" if fewest > 1 else "1 patch"
        raise ValueError(f"max_patches is {max_patches}, but an image needs at least {needed}.")
    sizing, side = config.sizing, config.patch
    unit = side * config.multiple
    if resize == "native" or (resize is None and sizing is None):
        most = (max_patches or NATIVE_MOST_PATCHES) // fewest
        rows, columns = _native_grid(height, width, unit, most)
        return _plan((rows * unit, columns * unit), None, side)
    if isinstance(sizing, PixelRange):
        most = sizing.most if max_patches is None else max_patches * side**2
        return _plan(_pixel_range_size(height, width, unit, sizing.least, most), None, side)
    if isinstance(sizing, PaddedPatches):
        sizing = replace(sizing, patches=max_patches or sizing.patches)
        return _padded_plan(height, width, unit, side, sizing)
    if isinstance(sizing, MostPatches):
        rows, columns = _most_patches_grid(height, width, side, max_patches or sizing.patches)
        return _plan((rows * side, columns * side), None, side)
    if max_patches is not None:
        raise ValueError(
            f"max_patches is {max_patches}, but this checkpoint's own preprocessing fixes the "
            'size of its images. Leave max_patches out, or ask for resize="native".'
        )
    if sizing is None:
        if min(height, width) < side:
            note = f"height {height}, width {width}, patch {side}"
            raise ImageError("aspect_ratio", "resize", note)
        return SizePlan(height, width, None, height // side, width // side)
    if isinstance(sizing, Exact):
        return _plan((sizing.height, sizing.width), sizing.crop, side)
    return _plan(_shortest_edge_size(height, width, sizing), sizing.crop, side, sizing.rest)


def half(rest: int, to: Literal["floor", "even"]) -> int:
    """Return the part of a rest that stands before a crop in its middle."""
    return rest // 2 if to == "floor" else round(rest / 2)


def _plan(
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    side: int,
    rest: Literal["floor", "even"] = "floor",
) -> SizePlan:
    """Plan a resize to `size` and a centre crop, both (height, width)."""
    height, width = size
    if height * width > MAX_PIXELS:
        raise ImageError("aspect_ratio", "resize", f"height {height}, width {width} once resized")
    box = None
    if crop is not None:
        if crop[0] > height or crop[1] > width:
            raise ValueError(
                f"The preprocessing cuts {crop[0]} x {crop[1]} pixels (height x width) out of an "
                f"image resized to {height} x {width}. Let it resize to at least the crop."
            )
        box = (half(height - crop[0], rest), half(width - crop[1], rest), *crop)
        height, width = crop
    if min(height, width) < side:
        raise ValueError(
            f"The preprocessing gives {height} x {width} pixels (height x width), which hold no "
            f"patch of {side} x {side}. Let it resize to at least {side} on each side."
        )
    return SizePlan(*size, box, height // side, width // side)


def _shortest_edge_size(height: int, width: int, sizing: ShortestEdge) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    longer = int(sizing.edge * long / short)  # cut off, not rounded, and in floating point: theirs
    return (longer, sizing.edge) if width <= height else (sizing.edge, longer)


def _pixel_range_size(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Return the reference's (height, width), multiples of `unit`, in its floating point.

    Raises: ImageError aspect_ratio for an image that the reference refuses.
    """
    if max(height, width) / min(height, width) > MOST_ASPECT:
        raise ImageError("aspect_ratio", "resize", f"height {height}, width {width}")
    tall, wide = (round(pixels / unit) * unit for pixels in (height, width))
    if tall * wide > most:
        shrink = sqrt(height * width / most)
        tall, wide = (max(unit, floor(x / shrink / unit) * unit) for x in (height, width))
    elif tall * wide < least:
        grow = sqrt(least / (height * width))
        tall, wide = (ceil(pixels * grow / unit) * unit for pixels in (height, width))
    return tall, wide


def _padded_plan(height: int, width: int, unit: int, patch: int, sizing: PaddedPatches) -> SizePlan:
    """Return the reference's size, in its floating point, which never enlarges, then pads or cuts.

    Source: transformers 5.17, models/kimi_k25/image_processing_kimi_k25.py; for the cut, Kimi-VL's
    own image processor, which cuts as torchvision does.
    """
    patches = max(1.0, height // patch) * max(1.0, width // patch)
    longest = sizing.side * patch
    scale = min(1.0, sqrt(sizing.patches / patches), longest / height, longest / width)
    tall, wide = (min(longest, max(1, int(pixels * scale))) for pixels in (height, width))
    rows, columns = (-(-pixels // unit) * unit // patch for pixels in (tall, wide))
    if rows * columns * patch**2 > MAX_PIXELS:
        raise ImageError("aspect_ratio", "resize", f"height {tall}, width {wide} once resized")
    if sizing.fill:
        return SizePlan(tall, wide, None, rows, columns)
    if min(tall, wide) < unit:
        raise ImageError("aspect_ratio", "resize", f"height {tall}, width {wide}, square {unit}")
    inner = tall // unit * unit, wide // unit * unit
    top, left = half(tall - inner[0], "even"), half(wide - inner[1], "even")
    return SizePlan(tall, wide, (top, left, *inner), inner[0] // patch, inner[1] // patch)


def _most_patches_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Return the reference's (rows, columns): bisect the scale, round both sides up.

    Step for step in its floating point, since at the edge of a patch any other order of operations
    gives another grid.
    """

    def grid(scale: float) -> tuple[int, int]:
        return max(1, ceil(height * scale / side)), max(1, ceil(width * scale / side))

    tolerance = 1e-5
    low, high = tolerance / 10, 100.0
    while high - low >= tolerance:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        if rows * columns <= most:
            low = middle
        else:
            high = middle
    return grid(low)


def _native_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Return (rows, columns), nearest to the image scaled by the largest fitting scale in (0, 1].

    In whole numbers, so that the answer is exact and the same everywhere.
    """

    def grid(scale: int) -> tuple[int, int]:  # in units of 2**-40
        half = side << 40
        rows, columns = ((2 * pixels * scale + half) // (2 * half) for pixels in (height, width))
        return max(1, rows), max(1, columns)

    low, high = 0, 1 << 40
    rows, columns = grid(high)
    if rows * columns <= most:
        return rows, columns
    # The grid only changes where a side crosses half a patch. Two such scales are never nearer than
    # patch / (2 * height * width), 7e-9 at 100 MP, and 2**-40 is 9e-13.
    while high - low > 1:
        middle = (low + high) // 2
        rows, columns = grid(middle)
        if rows * columns <= most:
            low = middle
        else:
            high = middle
    return grid(low)
