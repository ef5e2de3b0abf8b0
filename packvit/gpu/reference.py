"""The reference implementation of the resizing kernels, in numpy.

Tests compare it with Pillow, and the kernels with it. No torch.
"""

import numpy as np

from packvit.config import Filter
from packvit.gpu.resampling import BITS, HALF, Windows, rows_first, windows
from packvit.images.resize import SizePlan


def resize(pixels: np.ndarray, size: SizePlan, resample: Filter) -> np.ndarray:
    """Return RGB pixels resized and cropped as planned, in two passes with 8 bits in between.

    Shapes: uint8 [height, width, 3] -> uint8 [rows * patch, columns * patch, 3] or somewhat larger.
    """
    height, width = pixels.shape[:2]
    across = windows(width, size.width, resample)
    down = windows(height, size.height, resample)
    if rows_first((height, width), (size.height, size.width)):
        whole = _convolve(_convolve(pixels, across, 1), down, 0)
    else:
        whole = _convolve(_convolve(pixels, down, 0), across, 1)
    if size.crop is None:
        return whole
    top, left, height, width = size.crop
    return whole[top : top + height, left : left + width]


def _convolve(pixels: np.ndarray, side: Windows, axis: int) -> np.ndarray:
    pixels = pixels.swapaxes(0, axis).astype(np.int32)
    sums = np.full((len(side.starts), *pixels.shape[1:]), HALF, np.int32)
    for tap in range(side.weights.shape[1]):
        places = np.minimum(side.starts + tap, len(pixels) - 1)
        sums += side.weights[:, tap, None, None] * pixels[places]
    return np.clip(sums >> BITS, 0, 255).astype(np.uint8).swapaxes(0, axis)
