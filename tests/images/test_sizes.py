from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from packvit.config import Exact, ImageConfig, MostPatches, ShortestEdge, Sizing
from packvit.images.errors import ImageError
from packvit.images.resize import SizePlan, resize_plan

sides = st.integers(1, 6000)


def config(sizing: Sizing | None, patch: int = 14) -> ImageConfig:
    return ImageConfig(patch, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", sizing)


@settings(deadline=None)  # beside other tests on few cores, time says nothing
@given(height=sides, width=sides, edge=st.integers(14, 600))
def test_the_shortest_edge_gives_the_references_size(height: int, width: int, edge: int):
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    expected = get_resize_output_image_size(image, edge, False, None, "channels_last")
    if expected[0] * expected[1] > 100_000_000:
        with pytest.raises(ImageError, match="too short or too unequal"):
            resize_plan(height, width, config(ShortestEdge(edge)))
        return
    plan = resize_plan(height, width, config(ShortestEdge(edge)))
    assert (plan.height, plan.width) == expected
    assert (plan.rows, plan.columns) == (expected[0] // 14, expected[1] // 14)


@settings(deadline=None)
@given(height=sides, width=sides, most=st.integers(1, 2000), patch=st.sampled_from([14, 16, 32]))
def test_most_patches_give_the_references_grid(height: int, width: int, most: int, patch: int):
    expected = get_image_size_for_max_num_patches(height, width, patch, most)
    for sizing, asked in ((MostPatches(most), None), (MostPatches(), most)):
        plan = resize_plan(height, width, config(sizing, patch), max_patches=asked)
        assert (plan.height, plan.width) == expected
        assert (plan.rows * patch, plan.columns * patch) == expected


def native_oracle(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Walk down the scales at which a side crosses half a patch, to the first that fits."""

    def grid(scale: Fraction) -> tuple[int, int]:
        rows, columns = (floor(side * scale / patch + Fraction(1, 2)) for side in (height, width))
        return max(1, rows), max(1, columns)

    crossings = {
        Fraction((2 * count + 1) * patch, 2 * side)
        for side in (height, width)
        for count in range(side // patch + 2)
    }
    below = Fraction(1, 10**9)  # less than lies between any two crossings of such small images
    scales = [Fraction(1), *(scale - below for scale in sorted(crossings, reverse=True))]
    return next(
        grid(scale)
        for scale in scales
        if 0 < scale <= 1 and grid(scale)[0] * grid(scale)[1] <= most
    )


@settings(deadline=None)
@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    patch=st.sampled_from([14, 16]),
    most=st.integers(1, 300),
)
def test_native_is_the_largest_rounded_grid_that_fits(
    height: int, width: int, patch: int, most: int
):
    plan = resize_plan(height, width, config(None, patch), max_patches=most)
    assert (plan.rows, plan.columns) == native_oracle(height, width, patch, most)
    assert (plan.height, plan.width) == (plan.rows * patch, plan.columns * patch)
    assert plan.crop is None


@pytest.mark.parametrize(
    ("height", "width", "most", "grid"),
    [
        (448, 336, None, (32, 24)),
        (20, 21, None, (1, 2)),  # 1.43 and 1.5 patches
        (7, 6, None, (1, 1)),  # never 0
        (1, 5000, None, (1, 357)),
        (1, 20000, None, (1, 1024)),
        (4000, 3000, None, (37, 27)),
        (4000, 3000, 4096, (74, 55)),
        (20000, 20000, 1, (1, 1)),
    ],
)
def test_native_grids_one_can_work_out_by_hand(
    height: int, width: int, most: int | None, grid: tuple[int, int]
):
    plan = resize_plan(height, width, config(Exact(224, 224)), resize="native", max_patches=most)
    assert (plan.rows, plan.columns) == grid


def test_none_is_the_checkpoints_own_where_it_has_a_size_and_native_where_not():
    assert resize_plan(99, 50, config(Exact(28, 42))) == SizePlan(28, 42, None, 2, 3)
    assert resize_plan(99, 50, config(None)) == SizePlan(98, 56, None, 7, 4)
    assert resize_plan(99, 50, config(None), resize="native") == SizePlan(98, 56, None, 7, 4)


def test_a_checkpoint_without_a_size_keeps_the_pixels_and_drops_the_remainder():
    plan = resize_plan(99, 50, config(None), resize="checkpoint")
    assert plan == SizePlan(99, 50, None, 7, 3)
    with pytest.raises(
        ImageError, match=r'resize="native" .*height 13, width 50, patch 14'
    ) as error:
        resize_plan(13, 50, config(None), resize="checkpoint")
    assert (error.value.code, error.value.stage) == ("aspect_ratio", "resize")


def test_sides_that_are_no_multiple_lose_their_remainder():
    assert resize_plan(500, 300, config(Exact(384, 384))) == SizePlan(384, 384, None, 27, 27)


def test_the_crop_is_centred_and_rounded_up_and_left():
    plan = resize_plan(101, 200, config(ShortestEdge(57, crop=(42, 56))))
    assert plan == SizePlan(57, 112, (7, 28, 42, 56), 3, 4)


def test_a_sliver_that_would_grow_without_bounds_is_an_error_row():
    with pytest.raises(ImageError, match="height 224, width 1120000 once resized") as caught:
        resize_plan(1, 5000, config(ShortestEdge(224, crop=(224, 224))))
    assert (caught.value.code, caught.value.stage) == ("aspect_ratio", "resize")


def test_options_that_contradict_each_other_are_refused_in_words():
    fixed = config(ShortestEdge(224, crop=(224, 224)))
    refused = pytest.raises(ValueError, match=r'max_patches is 64, .* ask for resize="native"')
    with refused:
        resize_plan(300, 300, fixed, max_patches=64)
    for wanted in (fixed, config(None)):
        with refused:
            resize_plan(300, 300, wanted, resize="checkpoint", max_patches=64)
    with pytest.raises(ValueError, match="max_patches is 0, but an image needs at least 1"):
        resize_plan(300, 300, config(None), max_patches=0)
    with pytest.raises(ValueError, match=r"cuts 256 x 256 .* resized to 224 x 298"):
        resize_plan(300, 400, config(ShortestEdge(224, crop=(256, 256))))
    with pytest.raises(ValueError, match=r"gives 13 x 99 .* hold no patch of 14 x 14"):
        resize_plan(300, 400, config(Exact(13, 99)))
