"""Windows of patches, against transformers' own order of them."""

import torch
from transformers.vision_utils import get_vision_window_index

from packvit.packs.grid import join_frames, sequence_lengths
from packvit.packs.places import WindowPlaces

GRID = ((1, 2, 46), (2, 38, 2), (1, 16, 16), (3, 10, 12), (1, 2, 2))


def test_windows_hold_the_patches_of_transformers_windows():
    windows = WindowPlaces.from_grid(GRID, 8, device="cpu")
    squares, cu = get_vision_window_index(torch.tensor(GRID), 2, 112, 14)
    blocks = []  # the reference's tokens are in blocks of 2 x 2: where each stands in raster order
    first = 0
    for frames, rows, columns in GRID:
        for _ in range(frames):
            raster = first + torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2)
            blocks.append(raster.transpose(1, 2).reshape(-1, 4))
            first += rows * columns
    expected = torch.cat(blocks)[squares].flatten()
    assert windows.lengths == tuple(cu.diff().tolist())
    for ours, theirs in zip(
        windows.order.split(windows.lengths), expected.split(windows.lengths), strict=True
    ):
        assert ours.tolist() == sorted(theirs.tolist())


def test_windows_of_odd_sides_keep_every_patch_in_its_frame_and_come_back():
    grid = ((1, 9, 17), (2, 3, 5), (1, 1, 23))
    windows = WindowPlaces.from_grid(grid, 8, device="cpu")
    patches = torch.arange(sum(frames * rows * columns for frames, rows, columns in grid))
    assert torch.equal(windows.order[windows.back], patches)
    lengths = sequence_lengths(grid)
    for ours, frame in zip(windows.order.split(lengths), patches.split(lengths), strict=True):
        assert ours.sort().values.tolist() == frame.tolist()
    assert sum(windows.lengths) == len(patches)


def test_a_clip_is_one_sequence_of_all_its_frames():
    assert sequence_lengths(join_frames(((3, 4, 5), (1, 2, 2)))) == (60, 4)
