"""Matrices with what follows them, beside the plain model's modules."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_steps import EPILOGUES, swiglu
from torch import nn

from packvit.config import Activation
from packvit.fast.steps import add_linear_, linear_gelu_tanh, project
from packvit.model.activations import ACTIVATIONS, gelu_tanh
from packvit.model.linear import Linear


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_gelu_in_the_epilogue_is_nearer_to_fp32_than_a_pass_of_its_own(tokens: int):
    torch.manual_seed(tokens)
    linear = Linear(1152, 4304, device="cuda").bfloat16()
    x = torch.randn(tokens, 1152, device="cuda").bfloat16()
    with torch.inference_mode():
        weight, bias = linear.weight.double(), linear.bias.double()
        exact = gelu_tanh(F.linear(x.double(), weight, bias))
        fused, plain = linear_gelu_tanh(x, linear), gelu_tanh(linear(x))
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", EPILOGUES)
@pytest.mark.parametrize(
    ("tokens", "width", "mlp"), [(1, 64, 16), (77, 1024, 4096), (5000, 384, 1536)]
)
def test_an_activation_in_the_epilogue_is_nearer_to_exact_than_a_pass_of_its_own(
    dtype, activation: Activation, tokens: int, width: int, mlp: int
):
    from packvit.fast.kernels.matmuls import linear_act

    torch.manual_seed(tokens)
    up = Linear(width, mlp, device="cuda", dtype=dtype)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    with torch.inference_mode():
        found = linear_act(x, up.weight, up.bias, activation)
        plain = ACTIVATIONS[activation](up(x))
        exact = ACTIVATIONS[activation](F.linear(x.double(), up.weight.double(), up.bias.double()))
    assert (found.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_a_row_of_a_matmul_with_its_activation_does_not_know_of_other_rows():
    from packvit.fast.kernels.matmuls import linear_act

    torch.manual_seed(0)
    up = Linear(1024, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()
    with torch.inference_mode():
        whole = linear_act(x, up.weight, up.bias, "gelu")
        for first, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            part = linear_act(x[first : first + count].clone(), up.weight, up.bias, "gelu")
            assert torch.equal(part, whole[first : first + count])
        x[3] = float("nan")
        after = linear_act(x, up.weight, up.bias, "gelu")
    assert torch.equal(after[4:], whole[4:])
    assert after[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 2816), (33, 1025), (4096, 171)])
def test_silu_mul_is_nearer_to_exact_than_the_plain_model(dtype, tokens: int, width: int):
    from packvit.fast.kernels.gates import silu_mul

    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, 2 * width, device="cuda")).to(dtype)
    exact, fused, plain = swiglu(x.double()), silu_mul(x), swiglu(x)
    assert fused.dtype == dtype
    if dtype == torch.float32:  # the last bits are luck there; the encoder fuses in 16 bits alone
        torch.testing.assert_close(fused.double(), exact, atol=1e-6, rtol=1e-6)
    else:
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_silu_mul_writes_every_element_and_nan_stays_in_its_row():
    from packvit.fast.kernels.gates import silu_mul

    x = torch.randn(5, 2 * 1500, device="cuda")
    before = silu_mul(x)
    assert before.isfinite().all()
    x[2, 7] = float("nan")
    after = silu_mul(x)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "mlp"),
    [(1, 64, 8), (77, 1024, 2816), (300, 1032, 136), (5000, 384, 1024), (77, 1280, 3420)],
)
def test_swiglu_in_the_epilogue_is_nearer_to_exact_than_the_plain_model(
    dtype, bias: bool, tokens: int, width: int, mlp: int
):
    from packvit.fast.kernels.matmuls import swiglu as swiglu_kernel

    torch.manual_seed(tokens)
    gate_up = Linear(width, 2 * mlp, bias=bias, device="cuda", dtype=dtype)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    with torch.inference_mode():
        found = swiglu_kernel(x, gate_up.weight, gate_up.bias)
        plain = swiglu(gate_up(x))
        biases = gate_up.bias.double() if bias else None
        exact = swiglu(F.linear(x.double(), gate_up.weight.double(), biases))
    behind = found[:, mlp:]
    assert behind.shape[1] == -mlp % 8
    assert not behind.any()
    assert (found[:, :mlp].double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_a_row_of_swiglu_does_not_know_of_other_rows():
    from packvit.fast.kernels.matmuls import swiglu as swiglu_kernel

    torch.manual_seed(0)
    gate_up = Linear(1024, 2 * 2816, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()
    with torch.inference_mode():
        whole = swiglu_kernel(x, gate_up.weight, None)
        for first, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            part = swiglu_kernel(x[first : first + count].clone(), gate_up.weight, None)
            assert torch.equal(part, whole[first : first + count])
        x[3] = float("nan")
        after = swiglu_kernel(x, gate_up.weight, None)
    assert torch.equal(after[4:], whole[4:])
    assert after[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_what_a_matmul_adds_is_nearer_to_exact_than_the_plain_model(dtype, tokens: int):
    torch.manual_seed(tokens)
    linear = Linear(2816, 1024, bias=False, device="cuda", dtype=dtype)
    x = torch.randn(tokens, 2816, device="cuda").to(dtype)
    stream = torch.randn(tokens, 1024, device="cuda").to(dtype)
    exact = stream.double() + x.double() @ linear.weight.double().T
    with torch.inference_mode():
        plain = stream + linear(x)
        found, rest = project(stream, x, linear, nn.Identity(), False)
    assert rest is None
    assert found is stream
    assert (found.double() - exact).norm() <= (plain.double() - exact).norm()


def test_what_a_matmul_cannot_add_is_left_to_the_next_norm():
    """With a bias, a scale, a wrapper around it, or for training."""
    x, stream, none = torch.randn(3, 8), torch.randn(3, 8), nn.Identity()
    plain: Any = Linear(8, 8, bias=False)
    biased = Linear(8, 8)
    wrapped = nn.Sequential(plain)
    cases = [(biased, none, False), (wrapped, none, False), (plain, nn.Dropout(0), False)]
    with torch.no_grad():
        for linear, scale, needs_grad in [*cases, (plain, none, True)]:
            same, delta = project(stream, x, linear, scale, needs_grad)
            assert same is stream
            assert delta is not None
            assert delta.factor is None
            assert torch.equal(delta.tokens, linear(x))
        kept = add_linear_(stream.clone(), x, plain)
    torch.testing.assert_close(kept, stream + plain(x))
