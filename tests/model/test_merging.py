"""Merged tokens hold patches of one frame of one image, in raster order, whatever the grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packvit.merging import Merging

SIDES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


@given(grid=st.lists(SIDES, min_size=1, max_size=5), side=st.integers(1, 3))
def test_merging_equals_padding_each_frame_with_its_edge(grid, side: int):
    total = sum(t * rows * columns for t, rows, columns in grid)
    tokens = torch.arange(2.0 * total).view(total, 2)
    merging = Merging.from_grid(torch.tensor(grid), patches=total, side=side)
    expected, lengths, first = [], [], 0
    for frames, rows, columns in grid:
        for _ in range(frames):
            frame = tokens[first : first + rows * columns].numpy().reshape(rows, columns, 2)
            first += rows * columns
            more = ((0, -rows % side), (0, -columns % side), (0, 0))
            frame = np.pad(frame, more, mode="edge")
            high, wide = frame.shape[0] // side, frame.shape[1] // side
            squares = frame.reshape(high, side, wide, side, 2).transpose(0, 2, 1, 3, 4)
            expected.append(squares.reshape(high * wide, -1))
            lengths.append(high * wide)
    assert np.array_equal(merging.merge(tokens).numpy(), np.concatenate(expected))
    assert merging.segments.lengths == tuple(lengths)
    assert merging.segments.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert merging.grid_thw.tolist() == [[t, -(-r // side), -(-c // side)] for t, r, c in grid]


def test_every_patch_is_taught():
    grid = torch.tensor([(1, 3, 5), (2, 1, 1)])
    tokens = torch.ones(17, 4, requires_grad=True)
    Merging.from_grid(grid, patches=17).merge(tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.min() >= 1
    assert tokens.grad.sum() == (6 + 2) * 4 * 4


def test_wrong_grids_and_sides_are_refused():
    with pytest.raises(ValueError, match="holds 7 patches, but grid_thw describes 6"):
        Merging.from_grid(torch.tensor([(1, 2, 3)]), patches=7)
    with pytest.raises(ValueError, match="side is 0, but"):
        Merging.from_grid(torch.tensor([(1, 2, 3)]), patches=6, side=0)
