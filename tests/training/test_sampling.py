"""Every image once an epoch, in shares of about the same cost, the same on every process."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packvit.training.sampling import count_tokens, plan_steps


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    shares=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_no_image_is_forwarded_twice_or_lost(lengths: list[int], shares: int, seed: int):
    steps = plan_steps(lengths, 100, shares, seed=seed)
    counted = Counter(image for step in steps for s in step if s.counts for image in s.images)
    assert counted == Counter(range(len(lengths)))
    assert sum(count_tokens(step, lengths) for step in steps) == sum(lengths)
    assert all(len(step) == shares and all(share.images for share in step) for step in steps)
    assert all(sum(lengths[i] for i in share.images) <= 100 for step in steps for share in step)
    assert all(share.counts for step in steps[:-1] for share in step)


def test_shares_cost_about_the_same():
    draw = random.Random(0)
    lengths = [draw.choice([64, 256, 1024]) + draw.randrange(256) for _ in range(4000)]
    steps = plan_steps(lengths, 16384, 8)[:-1]
    assert len(steps) > 10
    for step in steps:
        tokens = [sum(lengths[i] for i in share.images) for share in step]
        costs = [sum(lengths[i] * (1 + lengths[i] / 6144) for i in share.images) for share in step]
        assert max(tokens) <= 1.05 * sum(tokens) / 8
        assert max(costs) <= 1.05 * sum(costs) / 8
        assert sum(tokens) >= 0.9 * 8 * 16384


def test_seed_and_epoch_tell_the_order():
    lengths = [3, 5, 7, 9] * 10
    again = [plan_steps(lengths, 20, 2, seed=s, epoch=e) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert plan_steps(lengths, 20, 2, seed=0, epoch=0) == again[0]
    assert again[0] != again[1] != again[2] != again[0]


def test_what_no_share_holds_is_refused():
    with pytest.raises(ValueError, match="Image 1 has 21 tokens, but a share holds 1 to 20"):
        plan_steps([20, 21], 20)
    with pytest.raises(ValueError, match="0 images and 1 shares"):
        plan_steps([], 20)
