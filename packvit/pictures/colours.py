"""Map numbers to colours, on one scale for all images. No torch."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

LOW, HIGH = 1, 99  # percentiles at the ends of the scale, so that outliers do not flatten the rest
BLANK = 238  # the grey of what is left out


def find_range(
    values: Sequence[Float[np.ndarray, "_ K"]],
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Return the ends of the scale of each of K numbers a patch, over all patches of all images."""
    low, high = np.percentile(np.concatenate(values), (LOW, HIGH), axis=0)
    return low, high


def rescale(
    values: Float[np.ndarray, "*T K"],
    low: Float[np.ndarray, " K"],
    high: Float[np.ndarray, " K"],
) -> Float[np.ndarray, "*T K"]:
    """Return values scaled from 0 at `low` to 1 at `high`; 0.5 if these are equal."""
    spread = high - low
    place = (values - low) / np.where(spread > 0, spread, 1)
    return np.where(spread > 0, place, 0.5).clip(0, 1)


def to_bytes(values: Float[np.ndarray, "*T K"]) -> UInt8[np.ndarray, "*T K"]:
    """Return values from 0 to 1 as 8 bits."""
    return np.round(values * 255).astype(np.uint8)


def ramp(places: Float[np.ndarray, "*T"]) -> UInt8[np.ndarray, "*T 3"]:
    """Return colours for values from 0, dark blue, over magenta to 1, pale yellow."""
    return ramp_table()[np.round(places * 255).astype(np.int64)]


@cache
def ramp_table() -> UInt8[np.ndarray, "256 3"]:
    """Return 256 colours of evenly rising lightness, so that equal steps look equal, also in grey.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020, for OKLab to sRGB.
    """
    step = np.linspace(0, 1, 256)
    lightness = 0.20 + 0.76 * step
    chroma = 0.02 + 0.17 * np.sin(np.pi * step) ** 0.8 + 0.07 * step
    hue = np.radians(-85 + 195 * step)  # blue, magenta, red, orange, yellow
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1)
    roots = lab @ np.array(
        [
            [1.0, 1.0, 1.0],
            [0.3963377774, -0.1055613458, -0.0894841775],
            [0.2158037573, -0.0638541728, -1.2914855480],
        ]
    )
    linear = roots**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    return to_bytes(np.where(linear <= 0.0031308, 12.92 * linear, curved))
