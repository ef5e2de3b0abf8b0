import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packvit.packs.planning import WINDOW, plan_packs


@given(lengths=st.lists(st.integers(1, 100)), lookahead=st.integers(1, 8))
def test_no_image_is_lost_and_neighbours_exceed_one_budget(lengths: list[int], lookahead: int):
    packs = list(plan_packs(lengths, 100, lookahead=lookahead))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    tokens = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(count <= 100 for count in tokens)
    assert all(left + right > 100 for left, right in pairwise(tokens))


@given(lengths=st.lists(st.integers(1, 100), max_size=60))
def test_no_more_than_the_window_ever_waits(lengths: list[int]):
    arrived = 0

    def arrivals():
        nonlocal arrived
        for length in lengths:
            arrived += length
            yield length

    left = 0
    for pack in plan_packs(arrivals(), 100):
        left += sum(lengths[index] for index in pack)
        assert arrived - left < WINDOW * 100 + 100  # the image that crosses the line is taken in


def test_the_stream_is_read_no_further_than_the_lookahead():
    arrivals = iter([60, 60, 60, 60])
    assert next(plan_packs(arrivals, 100, lookahead=2)) == [0]
    assert list(arrivals) == [60]


def test_packs_of_ordinary_photographs_are_97_percent_full():
    draw = random.Random(0)
    lengths = [draw.randint(240, 1008) for _ in range(1024)]
    packs = list(plan_packs(lengths, 16384))
    fills = [sum(lengths[index] for index in pack) / 16384 for pack in packs]
    assert sum(fills[:-1]) / len(fills[:-1]) > 0.97


def test_an_image_as_long_as_the_budget_travels_alone():
    assert list(plan_packs([100, 1, 100], 100)) == [[0], [1], [2]]


def test_an_image_that_no_pack_can_hold_is_named_with_the_remedies():
    with pytest.raises(ValueError, match=r"Image 1 has 101 tokens, .* Raise the budget, or resize"):
        list(plan_packs([5, 101], 100))
    with pytest.raises(ValueError, match="lookahead is 0, but plan_packs must see at least 1"):
        list(plan_packs([5], 100, lookahead=0))


def test_planning_does_not_load_torch():
    code = "import sys, packvit.packs.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
