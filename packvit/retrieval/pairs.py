"""All pairs of rows whose cosine reaches a threshold: exact, in blocks, with bounded memory.

Most pairs are ruled out by a few dimensions. With P an orthonormal basis of M of them, and r what
is left of the length of a unit vector, u . v <= Pu . Pv + r(u) r(v): one product of M + 1 columns.
Only the pairs that reach the threshold there are compared in full.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packvit.corpus import UsageError

TILE = (512, 1024)  # rows by rows that are compared at once: their bounds stay in a CPU's cache
ON_GPU = (8192, 32768)
SLACK = 1e-5  # of a bound in float32
MOST_PAIRS = 10_000_000
SAMPLE = 2048  # rows from which the basis is chosen
# What comparing a pair in full costs, in columns of the product (0.025 ns each on two cores): it is
# gathered from memory, so much for the pair, and so much for each dimension.
GATHERED = (6000, 80)
AT_ONCE = 1 << 16  # pairs that are compared in full at once

Tell = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of rows, left before right, and their cosines."""

    left: np.ndarray
    right: np.ndarray
    scores: np.ndarray


def find_pairs(unit: np.ndarray, threshold: float, device: torch.device, tell: Tell) -> Pairs:
    """Return all pairs of unit vectors whose cosine is at least `threshold`.

    `unit` may be memory-mapped: besides it, memory holds M + 1 numbers for each row, M chosen by
    what it saves.

    Shapes: unit [N, D] float32.
    Raises: UsageError if there are more than `MOST_PAIRS`.
    """
    basis = choose_basis(unit, threshold)
    heads = make_heads(unit, basis, device)
    least = threshold - SLACK
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for left, right in candidates(heads, least, device, tell):
        scores = compare(unit, left, right)
        kept = scores >= threshold
        count += int(kept.sum())
        if count > MOST_PAIRS:
            raise UsageError(
                f"More than {MOST_PAIRS:,} pairs of photographs have a cosine of {threshold:g} or "
                "more, which are not groups of copies. Raise `threshold`."
            )
        found.append((left[kept], right[kept], scores[kept]))
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    left, right, scores = (np.concatenate(parts) for parts in zip(empty, *found, strict=True))
    return Pairs(left, right, scores)


def candidates(
    heads: Tensor, least: float, device: torch.device, tell: Tell
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs (left, right), left before right, whose bound is at least `least`."""
    rows, columns = TILE if device.type == "cpu" else ON_GPU
    total = len(heads)
    buffer = torch.empty(rows * columns, dtype=torch.float32, device=device)
    for start in range(0, total, rows):
        tell(start, total)
        mine = heads[start : start + rows]
        for other in range(start, total, columns):
            theirs = heads[other : other + columns]
            shape = (len(mine), len(theirs))
            bounds = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(mine, theirs.T, out=bounds)
            found = reaching(bounds, least)
            if not len(found):
                continue
            left, right = found // len(theirs) + start, found % len(theirs) + other
            ahead = left < right
            if ahead.any():
                yield left[ahead], right[ahead]
    tell(total, total)


def reaching(bounds: Tensor, least: float) -> np.ndarray:
    """Return the flat places of the bounds that are at least `least`."""
    if bounds.device.type == "cpu":  # NumPy finds few among many ten times as fast as torch
        return np.flatnonzero(bounds.numpy() >= least)
    return (bounds >= least).flatten().nonzero().flatten().cpu().numpy()


def choose_basis(unit: np.ndarray, threshold: float) -> np.ndarray:
    """Return the leading principal directions [D, M] with which comparing is least work.

    M = D where no fewer rule out enough pairs of a sample.
    """
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(len(unit))[: 2 * SAMPLE])
    sample = np.asarray(unit[rows], np.float64)
    seen, unseen = sample[::2], sample[1::2]  # directions hold more of the rows they came from
    _, directions = np.linalg.eigh(seen.T @ seen)
    directions = directions[:, ::-1]
    width = unit.shape[1]
    heads = unseen @ directions
    best, least_work = width, float(width)
    size = 4
    while size < width:
        head = heads[:, :size]
        rest = np.sqrt(np.maximum(0, 1 - (head**2).sum(axis=1)))
        bounds = head @ head.T + rest[:, None] * rest
        reached = np.count_nonzero(bounds >= threshold - SLACK) - len(unseen)  # beside itself
        passing = reached / max(1, bounds.size)
        work = size + 1 + passing * (GATHERED[0] + GATHERED[1] * width)
        if work < least_work:
            best, least_work = size, work
        size *= 2
    return directions[:, :best].astype(np.float32)


def make_heads(unit: np.ndarray, basis: np.ndarray, device: torch.device) -> Tensor:
    """Return every row in the basis, and what is left of its length. Shapes: [N, M + 1]."""
    heads = np.empty((len(unit), basis.shape[1] + 1), np.float32)
    for start in range(0, len(unit), TILE[1]):
        block = heads[start : start + TILE[1]]
        np.matmul(unit[start : start + TILE[1]], basis, out=block[:, :-1])
        squares = np.einsum("nm,nm->n", block[:, :-1], block[:, :-1])
        block[:, -1] = np.sqrt(np.maximum(0, 1 - squares))
    return torch.from_numpy(heads).to(device)


def compare(unit: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosines of pairs of rows, in full."""
    scores = np.empty(len(left), np.float32)
    for start in range(0, len(left), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        scores[part] = np.einsum("nd,nd->n", unit[left[part]], unit[right[part]])
    return scores
