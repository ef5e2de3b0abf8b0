"""Gradients of fused steps, beside the plain model's."""

from typing import Any

import pytest
import torch
from plain_steps import EPILOGUES, add_norm, norms, swiglu
from torch import Tensor

from packvit.config import Activation
from packvit.fast.autograd import LinearAct, SiluMul
from packvit.fast.steps import Delta
from packvit.model.activations import ACTIVATIONS
from packvit.model.linear import Linear


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 1024), (33, 1025), (4096, 1152)])
@pytest.mark.parametrize("adds", [True, False])
def test_gradients_of_add_norm_are_as_near_to_exact_as_the_plain_model(
    dtype, tokens: int, width: int, adds: bool
):
    torch.manual_seed(tokens)
    stream, delta, *pulls = (torch.randn(4, tokens, width, device="cuda")).to(dtype)

    def gradients(fused: bool, norm: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype, copy=True).requires_grad_() for x in (stream, delta)[: 1 + adds]]
        if fused:
            outs = add_norm(given[0], Delta(given[1], None) if adds else None, norm, norm, True)
        else:
            summed = given[0] + given[1] if adds else given[0]
            outs = (summed, norm(summed))
        loss = [(out * pull.to(dtype)).sum() for out, pull in zip(outs, pulls, strict=True)]
        return list(torch.autograd.grad(loss[0] + loss[1], [*given, *norm.parameters()]))

    for norm in norms(width, "cuda", dtype):
        found, plain = (gradients(fused, norm, dtype) for fused in (True, False))
        exact = gradients(False, norm.double(), torch.float64)
        for ours, theirs, truth in zip(found, plain, exact, strict=True):
            assert ours.dtype == dtype
            error = (ours.double() - truth).norm()
            # What is summed is rounded alike; its bits beside that are luck for few tokens.
            assert error <= 1.05 * (theirs.double() - truth).norm() + 2e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "mlp"), [(1, 8), (77, 2816), (4096, 171)])
def test_gradients_of_swiglu_are_as_near_to_exact_as_the_plain_model(
    tokens: int, mlp: int, bias: bool
):
    torch.manual_seed(tokens)
    gate_up = Linear(64, 2 * mlp, bias=bias, device="cuda", dtype=torch.bfloat16)
    x, pull = torch.randn(tokens, 64, device="cuda"), torch.randn(tokens, mlp, device="cuda")

    def gradients(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        given = x.bfloat16().to(dtype, copy=True).requires_grad_()
        out = SiluMul.apply(gate_up(given)) if fused else swiglu(gate_up(given))
        loss = (out * pull.bfloat16().to(dtype)).sum()
        return list(torch.autograd.grad(loss, [given, *gate_up.parameters()]))

    found, plain = (gradients(fused, torch.bfloat16) for fused in (True, False))
    gate_up.double()
    for ours, theirs, truth in zip(found, plain, gradients(False, torch.float64), strict=True):
        error = (ours.double() - truth).norm()
        assert error <= 1.05 * (theirs.double() - truth).norm() + 4e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", EPILOGUES)
@pytest.mark.parametrize(("tokens", "mlp"), [(1, 8), (77, 4304), (4096, 171)])
def test_gradients_of_linear_act_are_as_near_to_exact_as_the_plain_model(
    tokens: int, mlp: int, activation: Activation
):
    torch.manual_seed(tokens)
    up = Linear(64, mlp, device="cuda", dtype=torch.bfloat16)
    x, pull = 3 * torch.randn(tokens, 64, device="cuda"), torch.randn(tokens, mlp, device="cuda")

    def gradients(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        given = x.bfloat16().to(dtype, copy=True).requires_grad_()
        act = ACTIVATIONS[activation]
        if fused:
            out = LinearAct.apply(given, up.weight, up.bias, activation, act)
        else:
            out = act(up(given))
        loss = (out * pull.bfloat16().to(dtype)).sum()
        return list(torch.autograd.grad(loss, [given, *up.parameters()]))

    found, plain = (gradients(fused, torch.bfloat16) for fused in (True, False))
    up.double()
    for ours, theirs, truth in zip(found, plain, gradients(False, torch.float64), strict=True):
        error = (ours.double() - truth).norm()
        assert error <= 1.05 * (theirs.double() - truth).norm() + 4e-3 * truth.norm()
