"""The largest cosines of queries to all vectors of a folder: exact, in one pass over them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from packvit.corpus import UsageError
from packvit.model.device import find_device

QUERIES = 512  # at once: their cosines to a block take 8 MiB


def choose_device(device: str | None) -> torch.device:
    """Return the device of that name; None is a GPU if there is one.

    Raises: UsageError for one that is not there.
    """
    try:
        return find_device(device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def find_nearest(
    queries: np.ndarray,
    blocks: Iterable[tuple[int, np.ndarray]],
    top: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines and the rows of the `top` nearest of each query, nearest first.

    Ties go to the earlier row. Where there are fewer rows with a direction, the cosines that are
    missing are -inf.

    Shapes: queries [Q, D], blocks of (first row, [rows, D]) -> float32 [Q, top], int64 [Q, top].
    """
    wanted = to_unit(torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device))
    best = torch.full((top, len(queries)), -torch.inf, dtype=torch.float32, device=device)
    rows = torch.zeros((top, len(queries)), dtype=torch.int64, device=device)
    for start, block in blocks:
        scores = cosines(block, wanted)
        found, places = best_rows(scores, top)
        merged = torch.cat([best, found])
        order = merged.sort(dim=0, descending=True, stable=True).indices[:top]
        best = merged.gather(0, order)
        rows = torch.cat([rows, places + start]).gather(0, order)
    return best.T.cpu().numpy(), rows.T.cpu().numpy()


def cosines(block: np.ndarray, wanted: Tensor) -> Tensor:
    """Return the cosines [rows, Q] of a block to unit vectors [Q, D]; -inf without a direction."""
    if wanted.device.type == "cpu":  # NumPy takes memory that is mapped or Arrow's as it is
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        scores = torch.from_numpy(block @ wanted.numpy().T).div_(torch.from_numpy(norms)[:, None])
    else:
        vectors = torch.tensor(block, dtype=torch.float32, device=wanted.device)
        scores = (vectors @ wanted.T).div_(torch.linalg.vector_norm(vectors, dim=1, keepdim=True))
    return scores.nan_to_num_(nan=-torch.inf)


def best_rows(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the `top` largest of each column and their rows, ties in the order of rows."""
    found, rows = scores.topk(min(top, len(scores)), dim=0)
    # topk takes any of the equal ones; where the last has equals outside, it is done again.
    tied = (scores >= found[-1]).sum(dim=0) > len(found)
    for column in tied.nonzero().flatten().tolist():
        order = scores[:, column].sort(descending=True, stable=True).indices
        rows[:, column] = order[: len(found)]
    rows = rows.sort(dim=0).values
    found, order = scores.gather(0, rows).sort(dim=0, descending=True, stable=True)
    return found, rows.gather(0, order)


def to_unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1."""
    return torch.nn.functional.normalize(vectors, dim=1)
