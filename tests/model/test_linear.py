"""Rows that are no whole words, as patches of 14 x 14 pixels are, are filled up on CUDA."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packvit.model.linear import affine


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_filling_up_changes_no_result_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, invariant: bool, cast: bool
):
    torch.manual_seed(0)
    x = torch.randn(30, 588).bfloat16().requires_grad_()
    weight, bias = torch.randn(64, 588), torch.randn(64)
    if not cast:  # autocast casts weights itself
        weight, bias = weight.bfloat16(), bias.bfloat16()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    widths = []

    def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        widths.append((tokens.shape[1], weight.shape[1]))
        return multiply(tokens, weight, bias)

    multiply = F.linear
    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found = affine(x, weight, bias, invariant)
    found.sum().backward()
    monkeypatch.undo()
    assert set(widths) == {(592, 592)}
    exact = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(found.float(), exact, atol=0.3, rtol=0.01)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.shape == x.shape
    torch.testing.assert_close(weight.grad[0].float(), x.float().sum(0), atol=0.2, rtol=0.02)
