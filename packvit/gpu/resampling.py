"""Pillow's filters in its own fixed point: what one side of an image is multiplied with. No torch.

Source: Pillow 13.0, src/libImaging/Resample.c, for the windows, the order of additions and the
rounding of weights; every one of them shows in the last bit of some pixel.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from jaxtyping import Int32

from packvit.config import Filter

BITS = 22  # of a weight's fraction: 8 bits of pixel and 2 of sums beyond 1 fill a signed 32
HALF = 1 << (BITS - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """For each pixel of a resized side, where its window starts, and the window's weights.

    Shapes: starts [out], weights [out, taps], 0 where a window is narrower than the widest.
    Units: weights in 2**-22.
    """

    starts: Int32[np.ndarray, " out"]
    weights: Int32[np.ndarray, "out taps"]


# C's own sine and cosine: numpy's are faster, and one unit off in the last place here and there.
_sine = np.vectorize(sin, otypes=[float])
_cosine = np.vectorize(cos, otypes=[float])


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - abs(x))


def _hamming(x: np.ndarray) -> np.ndarray:
    x = abs(x)
    angle = np.where(x == 0.0, 1.0, x) * pi
    inside = _sine(angle) / angle * (0.54 + 0.46 * _cosine(angle))
    return np.where(x == 0.0, 1.0, np.where(x < 1.0, inside, 0.0))


def _cubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, abs(x)
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0.0, 1.0, x) * pi
    return np.where(x == 0.0, 1.0, _sine(angle) / angle)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


# Each filter, and how far it reaches to either side.
FILTERS = {
    "box": (_box, 0.5),
    "bilinear": (_triangle, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@lru_cache(maxsize=1024)  # some 30 kB each; the photographs of one camera share their sizes
def windows(before: int, after: int, resample: Filter) -> Windows:
    """Return the windows that take a side of `before` pixels to one of `after`.

    A side that stays as it is gets windows of one pixel, as Pillow leaves out that pass.
    """
    if before == after:
        return Windows(
            np.arange(after, dtype=np.int32), np.full((after, 1), 1 << BITS, dtype=np.int32)
        )
    weigh, reach = FILTERS[resample]
    scale = before / after
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(after) + 0.5) * scale
    starts = np.maximum(0, (centers - support + 0.5).astype(np.int32))
    ends = np.minimum(before, (centers + support + 0.5).astype(np.int32))
    places = starts[:, None] + np.arange((ends - starts).max())
    weights = weigh((places - centers[:, None] + 0.5) * (1.0 / stretch))
    weights[places >= ends[:, None]] = 0.0
    # One by one, as C adds them: sum() would round otherwise.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    rounding = np.where(weights < 0, -0.5, 0.5)
    return Windows(starts, (weights * (1 << BITS) + rounding).astype(np.int32))


def rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Return whether a resize makes each row narrower, or wider, before it touches the columns.

    Since Pillow 13 it does so unless the height loses more than twice the pixels that the width
    does. In between lie pixels of 8 bits, so the order shows.

    Units: (height, width) in pixels.
    """
    fewer_rows, fewer_columns = (b - a for b, a in zip(before, after, strict=True))
    return fewer_rows <= max(0, 2 * fewer_columns)
