import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packvit.packs.grid import segment_images
from packvit.packs.places import PatchPlaces
from packvit.packs.segments import Segments

GRID = torch.tensor([[1, 4, 6], [1, 3, 5], [2, 2, 2]])  # 3 images, 4 sequences, 47 patches

grids = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6
)


def test_every_frame_is_a_sequence():
    found = Segments.from_grid(GRID, patches=47)
    assert found.lengths == (24, 15, 4, 4)
    assert found.cu_seqlens.tolist() == [0, 24, 39, 43, 47]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.starts == (0, 24, 39, 43)
    assert found.max_seqlen == 24


def test_prefix_tokens_lengthen_every_sequence():
    found = Segments.from_grid(GRID, patches=47, prefix=5)
    assert found.lengths == (29, 20, 9, 9)
    assert found.tokens == 47 + 4 * 5


@given(grid=grids)
def test_patches_stand_in_raster_order_frame_after_frame(grid: list[tuple[int, int, int]]):
    found = PatchPlaces.from_grid(tuple(grid))
    expected = [
        (row, column, rows, columns)
        for frames, rows, columns in grid
        for _ in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    places = zip(found.row, found.column, found.rows, found.columns, strict=True)
    assert [tuple(map(int, place)) for place in places] == expected


@given(grid=grids)
def test_patches_know_their_sequence(grid: list[tuple[int, int, int]]):
    frames = [rows * columns for frames, rows, columns in grid for _ in range(frames)]
    expected = [sequence for sequence, size in enumerate(frames) for _ in range(size)]
    assert PatchPlaces.from_grid(tuple(grid)).sequence.tolist() == expected


@given(grid=grids)
def test_every_sequence_knows_its_image(grid: list[tuple[int, int, int]]):
    expected = [image for image, (frames, _, _) in enumerate(grid) for _ in range(frames)]
    assert segment_images(tuple(grid)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integers_make_a_grid(dtype: torch.dtype):
    assert Segments.from_grid(GRID.to(dtype), patches=47).lengths == (24, 15, 4, 4)


@pytest.mark.parametrize(
    ("rows", "patches", "answer"),
    [
        ([[1, 56, 84]], 55, r"holds 55 patches, .* describes 4704 \(1 images\).* not pixels"),
        ([[1, 4, 6], [1, 0, 5]], 24, r"grid_thw\[1\] is \(1, 0, 5\); every count is 1 or more"),
        ([[4, 6]], 24, r"must be \[num_images, 3\] with at least one image, not \[1, 2\]"),
        ([[1.0, 4.0, 6.0]], 24, "must hold integers, not torch.float32"),
        ([[True, True, True]], 1, "must hold integers, not torch.bool"),
        ([], 0, "at least one image"),
    ],
)
def test_a_wrong_grid_is_answered_with_what_a_grid_is(rows: list, patches: int, answer: str):
    with pytest.raises(ValueError, match=answer):
        Segments.from_grid(torch.tensor(rows), patches=patches)
