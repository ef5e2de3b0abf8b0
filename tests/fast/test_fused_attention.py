"""What is done to queries, keys and values on their way, beside the plain model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packvit.fast.attention import is_batch
from packvit.model.rotary import rotate


def test_no_batch_has_more_sequences_than_the_third_axis_of_a_grid():
    assert is_batch([16] * 65_535)
    assert not is_batch([16] * 65_536)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_become_zero_and_others_are_left(dtype: torch.dtype):
    from packvit.fast.kernels.attention import zero_nonfinite_

    torch.manual_seed(0)
    qkv = torch.randn(1000, 3, 6, 72, device="cuda").to(dtype)
    qkv[5], qkv[64:200], qkv[999] = float("nan"), float("inf"), float("-inf")
    if dtype == torch.float16:
        qkv[300, 2, 3, 7] = float("inf")  # a sum of its own that overflows
    before = qkv.clone()
    zero_nonfinite_(qkv[:, 2], qkv[:, 1])
    bad = before[:, 2].isfinite().logical_not()
    assert torch.equal(qkv[:, 0].nan_to_num(1.0), before[:, 0].nan_to_num(1.0))
    assert qkv[:, 1][bad].isnan().all()
    assert torch.equal(qkv[:, 1][~bad], before[:, 1][~bad])
    assert torch.equal(qkv[:, 2], before[:, 2].where(~bad, 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "wide"), [(72, 96), (96, 72), (80, 96), (8, 32)])
def test_heads_are_widened_with_zeros_and_cut_again(depth: int, wide: int):
    from packvit.fast.kernels.attention import widen

    whole = torch.randn(77, 3, 5, depth, device="cuda").bfloat16()
    expected = F.pad(whole, (0, wide - depth))
    assert torch.equal(widen(whole, wide), expected)
    assert torch.equal(widen(whole[:, 1], wide), expected[:, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (6, 64), (16, 72), (20, 80), (4, 128)])
@pytest.mark.parametrize("alike", [True, False])
def test_rotary_positions_in_place_are_nearer_to_exact_than_the_plain_model(
    dtype, heads: int, head_dim: int, alike: bool
):
    from packvit.fast.attention import RotateQueriesAndKeys, rotate_queries_and_keys_

    torch.manual_seed(heads)
    angles = 3 * torch.randn(333, head_dim, device="cuda")
    angles = angles[:, : head_dim // 2].tile(2) if alike else angles  # OneVision-Encoder's differ
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = torch.randn(333, 3, heads, head_dim, device="cuda").to(dtype)
    turned, before = qkv.clone(), qkv.clone()
    rotate_queries_and_keys_(turned, cosine, sine)
    assert torch.equal(turned[:, 2], before[:, 2])
    for part in range(2):
        exact = rotate(before[:, part].double(), cosine.double(), sine.double())
        plain = rotate(before[:, part], cosine, sine)
        error = (turned[:, part].double() - exact).norm()
        assert error <= (plain.double() - exact).norm()
    turn: Any = RotateQueriesAndKeys.apply
    pull = torch.randn_like(qkv)
    qkv.requires_grad_()
    [found] = torch.autograd.grad((turn(qkv, cosine, sine) * pull).sum(), qkv)
    given = before.double().requires_grad_()
    q, k, v = given.unbind(1)
    q, k = (rotate(x, cosine.double(), sine.double()) for x in (q, k))
    [exact] = torch.autograd.grad((torch.stack([q, k, v], 1) * pull.double()).sum(), given)
    torch.testing.assert_close(found.double(), exact, atol=0.05, rtol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [64, 128])
def test_short_attention_is_as_near_to_exact_as_torch(dtype: torch.dtype, depth: int):
    from packvit.fast.kernels.short_attention import attend_short

    torch.manual_seed(depth)
    for length in (1, 5, 16, 31, 33, 64, 65, 80, 197, 256, 257, 261, 320, 577):
        qkv = torch.randn(7 * length, 3, 3, depth, device="cuda").to(dtype)
        qkv[:, 0] *= 3  # so that some shares are near to 1
        given = qkv.clone()
        found = attend_short(qkv, length)
        assert torch.equal(qkv, given)
        exact, usual = (attended(x, length) for x in (qkv.double(), qkv))
        error, other = ((x.double() - exact).norm() for x in (found, usual))
        assert error <= 1.2 * other, length


def attended(qkv: Tensor, length: int) -> Tensor:
    """Attention by torch. Shapes: [T, 3, H, K] -> [T, H, K]."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_short_attention_keeps_what_is_not_finite_in_its_sequence(bad: float):
    from packvit.fast.kernels.short_attention import attend_short

    qkv = torch.randn(5 * 70, 3, 2, 64, device="cuda").bfloat16()
    before = attend_short(qkv, 70)
    qkv[2 * 70 + 69] = bad
    after = attend_short(qkv, 70)
    own = slice(2 * 70, 3 * 70)
    assert not after[own].isfinite().any()
    after[own] = before[own]
    assert torch.equal(after, before)
