"""Exact PCA of tokens given in batches, and foreground by the first component. No torch.

Mean and scatter matrix are merged in float64, and no token is kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

COMPONENTS = 3  # red, green, blue


@dataclass(frozen=True, slots=True)
class Basis:
    """The first components of a PCA, by explained variance.

    Shapes: mean [D]; components [3, D], of length 1, or 0 where nothing varies; variances [3].
    """

    mean: Float[np.ndarray, " D"]
    components: Float[np.ndarray, "K D"]
    variances: Float[np.ndarray, " K"]
    total: float  # variance of the tokens over all D directions

    @property
    def shares(self) -> list[float]:
        """The share of the variance that each component explains."""
        return [float(one / self.total) if self.total else 0.0 for one in self.variances]

    def project(self, tokens: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T K"]:
        """Return the coordinates of tokens along the components."""
        return (tokens - self.mean) @ self.components.T


def fit(batches: Iterable[Float[np.ndarray, "_ D"]]) -> Basis:
    """Return the basis of all tokens in `batches`; one batch is in memory at a time.

    The sign of a component is such that its entry of largest magnitude is positive, as in
    scikit-learn's PCA, so that it does not depend on the order of the tokens or on the machine.

    Raises: ValueError if there is no token.
    Source: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979, equation 2.1, for the merging.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        if not len(batch):
            continue
        tokens = batch.astype(np.float64)
        middle = tokens.mean(0)
        tokens -= middle
        products = tokens.T @ tokens
        if count:
            apart = middle - mean
            merged = count + len(tokens)
            scatter += products + np.outer(apart, apart) * (count * len(tokens) / merged)
            mean = mean + apart * (len(tokens) / merged)
            count = merged
        else:
            count, mean, scatter = len(tokens), middle, products
    if not count:
        raise ValueError("No tokens were given, but a PCA needs at least one.")
    variances, vectors = np.linalg.eigh(scatter / max(count - 1, 1))  # smallest first
    total = float(variances.clip(0).sum())
    variances = variances[: -COMPONENTS - 1 : -1].clip(0)
    components = vectors[:, : -COMPONENTS - 1 : -1].T
    places = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(len(components)), places])[:, None]
    # The variance of float32 rounding: components below it are noise and are set to 0.
    noise = (total + float(mean @ mean)) * float(np.finfo(np.float32).eps) ** 2
    return Basis(mean, np.where(variances[:, None] > noise, components, 0), variances, total)


def split_in_two(values: Float[np.ndarray, " T"]) -> float:
    """Return the threshold that splits values into two groups with the largest variance between.

    It is the middle between the two neighbouring values, or the value itself if all are equal.

    Source: N. Otsu, "A threshold selection method from gray-level histograms", 1979, equation 18,
    over the values themselves in place of a histogram.
    """
    ordered = np.sort(values.astype(np.float64))
    ends = np.flatnonzero(np.diff(ordered)) + 1  # how many values each split leaves below
    if not len(ends):
        return float(ordered[0])
    sums = np.cumsum(ordered)
    below = sums[ends - 1] / ends
    above = (sums[-1] - sums[ends - 1]) / (len(ordered) - ends)
    best = ends[np.argmax(ends * (len(ordered) - ends) * np.square(above - below))]
    return float((ordered[best - 1] + ordered[best]) / 2)


def find_foreground(
    firsts: Sequence[Float[np.ndarray, "_ _"]],
) -> list[Bool[np.ndarray, "_ _"]]:
    """Return which patches are foreground, by the first component.

    One threshold splits the patches of all images in two. The background is the side with a larger
    share of the border patches than of all patches; if neither is, the low side.

    Shapes: N maps [rows, columns] -> N masks [rows, columns].
    """
    threshold = split_in_two(np.concatenate([first.reshape(-1) for first in firsts]))
    high = [first > threshold for first in firsts]
    rims = np.concatenate([rim(mask) for mask in high])
    share = np.concatenate([mask.reshape(-1) for mask in high]).mean()
    return [~mask for mask in high] if rims.mean() > share else high


def rim(values: np.ndarray) -> np.ndarray:
    """Return the outermost entries of [rows, columns], each once."""
    inside = np.zeros(values.shape, bool)
    inside[1:-1, 1:-1] = True
    return values[~inside]
