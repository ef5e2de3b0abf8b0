"""The grid of a pack, checked once and read to the host: the rows and columns of every image."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

Grid = tuple[tuple[int, int, int], ...]  # (frames, rows, columns) of each image, in patches

# On the host, best as a tensor: int64 [N, 3].
GridLike = Tensor | np.ndarray | Sequence[Sequence[int]]

ROW_MEANING = "Each row of grid_thw is (frames, rows, columns) counted in patches, not pixels."


def read_grid(grid_thw: GridLike, *, patches: int | None) -> Grid:
    """Check `grid_thw` against the number of patches, if any, and return its rows as host ints.

    On the host this is free; a grid on a device is copied once, and the host waits for it.

    Shapes: grid_thw [N, 3], any integer dtype, N >= 1.
    Raises: ValueError naming the first row that cannot be an image, or both numbers of patches;
    TypeError if it holds no numbers.
    """
    grid_thw = as_tensor(grid_thw)
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or len(grid_thw) == 0:
        raise ValueError(
            f"grid_thw must be [num_images, 3] with at least one image, "
            f"not {list(grid_thw.shape)}. {ROW_MEANING}"
        )
    if grid_thw.is_floating_point() or grid_thw.is_complex() or grid_thw.dtype == torch.bool:
        raise ValueError(f"grid_thw must hold integers, not {grid_thw.dtype}. {ROW_MEANING}")
    grid = tuple((frames, rows, columns) for frames, rows, columns in grid_thw.tolist())
    for image, row in enumerate(grid):
        if min(row) < 1:
            raise ValueError(f"grid_thw[{image}] is {row}; every count is 1 or more. {ROW_MEANING}")
    described = sum(frames * rows * columns for frames, rows, columns in grid)
    if patches is not None and described != patches:
        raise ValueError(
            f"hidden_states holds {patches} patches, but grid_thw describes {described} "
            f"({len(grid)} images). {ROW_MEANING}"
        )
    return grid


def as_tensor(rows: GridLike, name: str = "grid_thw", meaning: str = ROW_MEANING) -> Tensor:
    """Return rows of numbers given as a list or an array as a tensor on the host.

    Raises: TypeError if it holds no numbers.
    """
    if isinstance(rows, Tensor):
        return rows
    try:
        return torch.from_numpy(np.array(rows))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is {rows!r}, but must be a tensor, an array or a list of rows of three "
            f"whole numbers. {meaning}"
        ) from error


def join_frames(grid: Grid) -> Grid:
    """Return clips as images of one frame, as tall as all of theirs: where clips are sequences."""
    return tuple((1, frames * rows, columns) for frames, rows, columns in grid)


def sequence_lengths(grid: Grid, prefix: int = 0) -> tuple[int, ...]:
    """Return the tokens of each frame of each image: S host ints."""
    return tuple(prefix + rows * columns for frames, rows, columns in grid for _ in range(frames))


def segment_images(grid: Grid) -> Int64[np.ndarray, " S"]:
    """Return the image of each sequence, on the host."""
    return np.repeat(np.arange(len(grid)), [frames for frames, _, _ in grid])


def frame_table(grid: Grid) -> Int64[np.ndarray, "3 S"]:
    """Return the rows and columns of each frame, and its first patch, on the host."""
    sides = np.asarray(grid, dtype=np.int64)
    rows, columns = np.repeat(sides[:, 1:], sides[:, 0], axis=0).T
    sizes = rows * columns
    return np.array([rows, columns, sizes.cumsum() - sizes])


def to_device(numbers: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy host numbers to `device` without waiting for it.

    Only for small arrays: from memory that is not pinned, CUDA copies more than 64 KiB only after
    all earlier work, and pinning takes longer than copying.
    """
    return torch.from_numpy(numbers).to(device, non_blocking=True)
