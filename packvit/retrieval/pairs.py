"""All pairs of rows whose cosine reaches a threshold: exact, in blocks, with bounded memory.

Most pairs are ruled out by a few dimensions. With P an orthonormal basis of M of them, and r(u)
what is left of the length of u, the head h(u) = (Pu, r(u)) is as long as u, and u . v is at most
h(u) . h(v), a product of M + 1 columns: two vectors are at least as far apart as their heads.

Heads are rounded to bfloat16, whose products many CPUs compute four times as fast. No head moves
by more than d, so h(u) . h(v) is at most the product of the rounded heads plus 2d + d^2. The pairs
that reach the threshold there are compared in full.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packvit.corpus import UsageError

TILE = (1024, 1024)  # rows by rows that are compared at once: their bounds stay in a CPU's cache
ON_GPU = (8192, 32768)
MOST_PAIRS = 10_000_000
SAMPLE = 2048  # rows from which the basis is chosen
SIZES = (15, 31, 47, 63, 79, 95, 111, 127, 159, 191, 255, 383, 511)  # M: of whole registers
# What comparing a pair in full costs, in columns of the product (0.004 ns each on a core): it is
# gathered from memory, so much for the pair, and so much for each dimension.
GATHERED = (100_000, 300)
AT_ONCE = 1 << 10  # pairs that are compared in full at once
STEP = 2.0**-23  # of a sum in float32, whichever way it is rounded
HALF_STEP = 2.0**-8  # of bfloat16, relative

Tell = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of rows, left before right, in ascending order, and their cosines in float64."""

    left: np.ndarray
    right: np.ndarray
    scores: np.ndarray


def find_pairs(unit: np.ndarray, threshold: float, device: torch.device, tell: Tell) -> Pairs:
    """Return all pairs of unit vectors whose product in float64 is at least `threshold`.

    `unit` may be memory-mapped: besides it, memory holds M + 1 numbers of two bytes for each row,
    or of four where products in bfloat16 are slow; M is chosen by what it saves.

    Shapes: unit [N, D] float32.
    Raises: UsageError if there are more than `MOST_PAIRS`.
    """
    heads, moved = round_heads(make_heads(unit, choose_basis(unit, threshold)))
    least = threshold - slack(moved, heads.shape[1])
    heads = heads.to(device, choose_dtype(heads, least, device))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for left, right in candidates(heads, least, tell):
        kept, scores = compare(unit, left, right, threshold)
        count += len(kept)
        if count > MOST_PAIRS:
            raise UsageError(
                f"More than {MOST_PAIRS:,} pairs of photographs have a cosine of {threshold:g} or "
                "more, which are not groups of copies. Raise `threshold`, or leave out photographs "
                "that are all alike, such as placeholders."
            )
        found.append((left[kept], right[kept], scores))
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
    left, right, scores = (np.concatenate(parts) for parts in zip(empty, *found, strict=True))
    order = np.lexsort([right, left])
    return Pairs(left[order], right[order], scores[order])


def candidates(heads: Tensor, least: float, tell: Tell) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs (left, right), left before right, whose bound is at least `least`."""
    rows, columns = TILE if heads.device.type == "cpu" else ON_GPU
    total = len(heads)
    buffer = torch.empty(rows * columns, dtype=heads.dtype, device=heads.device)
    for start in range(0, total, rows):
        tell(start, total)
        mine = heads[start : start + rows]
        for other in range(start, total, columns):
            theirs = heads[other : other + columns]
            bounds = buffer[: len(mine) * len(theirs)].view(len(mine), len(theirs))
            torch.mm(mine, theirs.T, out=bounds)
            left, right = reaching(bounds, least)
            left, right = left + start, right + other
            ahead = left < right
            if ahead.any():
                yield left[ahead], right[ahead]
    tell(total, total)


def reaching(bounds: Tensor, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the bounds that are at least `least`.

    Rows without any are ruled out by their largest.
    """
    limit = torch.tensor(least, dtype=bounds.dtype, device="cpu")
    if bounds.dtype == torch.bfloat16:  # positive ones are in the order of their bits
        bounds, limit = bounds.view(torch.int16), limit.view(torch.int16)
    rows = (bounds.amax(dim=1) >= limit).nonzero().flatten()
    if not len(rows):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    inside = bounds.index_select(0, rows) >= limit
    if inside.device.type == "cpu":  # NumPy finds few among many ten times as fast as torch
        places = np.flatnonzero(inside.numpy())
    else:
        places = inside.flatten().nonzero().flatten().cpu().numpy()
    found, columns = np.divmod(places, bounds.shape[1])
    return rows.cpu().numpy()[found], columns


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
    best, least_work = width, float(width)
    for size in SIZES:
        if size + 1 >= least_work:
            break
        heads, moved = round_heads(make_heads(unseen, directions[:, :size]))
        limit = threshold - slack(moved, size + 1) - HALF_STEP
        passing = int((heads.float() @ heads.float().T >= limit).sum())
        share = (passing - len(unseen)) / max(1, len(unseen) ** 2)  # without each beside itself
        work = size + 1 + share * (GATHERED[0] + GATHERED[1] * width)
        if work < least_work:
            best, least_work = size, work
    return directions[:, :best]


def make_heads(unit: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return every row in the basis, and what is left of its length. Shapes: [N, M + 1]."""
    heads = np.empty((len(unit), basis.shape[1] + 1), np.float32)
    for start in range(0, len(unit), TILE[0]):
        block = unit[start : start + TILE[0]].astype(np.float64)
        inside = block @ basis
        rest = np.einsum("nd,nd->n", block, block) - np.einsum("nm,nm->n", inside, inside)
        heads[start : start + TILE[0], :-1] = inside
        heads[start : start + TILE[0], -1] = np.sqrt(np.maximum(0, rest))
    return heads


def round_heads(heads: np.ndarray) -> tuple[Tensor, float]:
    """Return the heads rounded to numbers of bfloat16, and the longest way that one moved."""
    plain = torch.from_numpy(heads)
    rounded = plain.bfloat16()
    moved = 0.0
    for start in range(0, len(heads), TILE[0]):
        part = slice(start, start + TILE[0])
        away = (plain[part] - rounded[part]).square().sum(dim=1)
        moved = max(moved, float(away.max()) ** 0.5)
    return rounded, moved


def slack(moved: float, columns: int) -> float:
    """Return how far a bound may be below the product of two heads: moved, and summed up."""
    return 2 * moved + moved**2 + (columns + 8) * STEP


def choose_dtype(heads: Tensor, least: float, device: torch.device) -> torch.dtype:
    """Return the dtype of products: bfloat16 on a CPU that is quicker and no less exact with it.

    On a GPU they are float32; TF32, where a user allows it, holds the heads' numbers too.
    """
    if device.type != "cpu" or least <= 0 or not len(heads):  # bits of negatives are in reverse
        return torch.float32
    mine, theirs = heads[: TILE[0]], heads[: TILE[1]].T
    plain = mine.float() @ theirs.float()
    away = ((mine @ theirs).float() - plain).abs() - HALF_STEP * plain.abs()
    if away.max() > slack(0.0, heads.shape[1]):
        return torch.float32
    dtypes = (torch.bfloat16, torch.float32)
    return min(dtypes, key=lambda dtype: seconds(mine.to(dtype), theirs.to(dtype)))


def seconds(mine: Tensor, theirs: Tensor) -> float:
    """Return the time that a product takes, the least of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        _ = mine @ theirs
        taken.append(time.perf_counter() - start)
    return min(taken)


def compare(
    unit: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs of rows reach the threshold, and their cosines, in full."""
    near = threshold - unit.shape[1] * STEP
    kept: list[np.ndarray] = []
    for start in range(0, len(left), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        scores = np.einsum("nd,nd->n", unit[left[part]], unit[right[part]])
        kept.append(np.flatnonzero(scores >= near) + start)
    places = np.concatenate(kept)
    exact = np.empty(len(places), np.float64)
    for start in range(0, len(places), AT_ONCE):
        part = places[start : start + AT_ONCE]
        rows = (unit[side[part]].astype(np.float64) for side in (left, right))
        exact[start : start + AT_ONCE] = np.einsum("nd,nd->n", *rows)
    reached = exact >= threshold
    return places[reached], exact[reached]
