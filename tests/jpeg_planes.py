"""The reference implementation of colour in JPEGs: from a file's planes to its upright pixels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from packvit.gpu.jpeg import Jpeg
from packvit.images.turns import FLIPPED_COLUMNS, FLIPPED_ROWS, TRANSPOSED


def upright_rgb(planes: Sequence[np.ndarray], jpeg: Jpeg) -> UInt8[np.ndarray, "height width 3"]:
    """Return the upright RGB of a file's planes: luma, then both of chroma where there are any.

    Source: libjpeg-turbo 3.1, jdcolor.c, in 16 bits of fraction.
    """
    luma = planes[0].astype(np.int32)
    if jpeg.sampling is None:
        rgb = np.repeat(planes[0][..., None], 3, axis=2)
    else:
        blue, red = (upsample(plane, jpeg) - 128 for plane in planes[1:])
        channels = (
            luma + ((91881 * red + 32768) >> 16),
            luma + ((-22554 * blue - 46802 * red + 32768) >> 16),
            luma + ((116130 * blue + 32768) >> 16),
        )
        rgb = np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)
    if jpeg.turn in FLIPPED_ROWS:
        rgb = rgb[::-1]
    if jpeg.turn in FLIPPED_COLUMNS:
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb.swapaxes(0, 1) if jpeg.turn in TRANSPOSED else rgb)


def upsample(plane: np.ndarray, jpeg: Jpeg) -> np.ndarray:
    """Bring a chroma plane to luma's size: 3/4 of the nearest sample, 1/4 of the next, each way.

    Biases alternate so that rounding favours no side.

    Source: libjpeg-turbo 3.1, jdsample.c, "fancy" upsampling.
    """
    across, down = jpeg.sampling or (1, 1)
    rows, columns = np.arange(jpeg.height), np.arange(jpeg.width)
    sums = plane.astype(np.int32)
    for axis, factor, places in ((0, down, rows), (1, across, columns)):
        if factor == 1:
            sums = sums * 4
            continue
        near = places // 2
        beside = np.clip(near - 1 + 2 * (places % 2), 0, plane.shape[axis] - 1)
        sums = 3 * sums.take(near, axis) + sums.take(beside, axis)
    if (across, down) == (2, 2):
        bias = (8 - columns % 2)[None, :]
    elif across == 2:
        bias = (4 + 4 * (columns % 2))[None, :]
    elif down == 2:
        bias = (4 + 4 * (rows % 2))[:, None]
    else:
        bias = 0
    return (sums + bias) >> 4
