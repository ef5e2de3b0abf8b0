"""What is done to queries, keys and values on their way, beside the plain model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from packvit.model.rotary import rotate


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
