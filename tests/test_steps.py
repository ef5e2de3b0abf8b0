"""Fused steps beside their plain twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.linear import Linear, Linear8, Rows8, quantise
from packvit.steps import (
    ACTIVATIONS,
    STEPS,
    RMSNorm,
    add_norm,
    gelu_tanh,
    may_fuse,
    rise,
    rise_fused,
)


def test_fused_steps_are_for_cuda_inference_alone():
    linear, x = nn.Linear(8, 16), torch.randn(3, 8)
    assert not may_fuse(x, linear.weight)
    with torch.inference_mode():
        assert not may_fuse(x, linear.weight)


@pytest.mark.gpu
def test_fused_steps_leave_training_to_their_plain_twins():
    linear, x = nn.Linear(8, 16, device="cuda"), torch.randn(3, 8, device="cuda")
    with torch.no_grad():
        assert not may_fuse(x, linear.weight)  # fp32 is for being exact
    linear, x = linear.bfloat16(), x.bfloat16()
    assert not may_fuse(x, linear.weight)
    with torch.no_grad():
        assert may_fuse(x, linear.weight)
    linear.requires_grad_(False)
    assert may_fuse(x, linear.weight)  # frozen, and nothing before it is taught
    assert not may_fuse(x.requires_grad_(), linear.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_gelu_in_the_epilogue_is_nearer_to_fp32_than_its_plain_twin(tokens: int):
    torch.manual_seed(tokens)
    linear = Linear(1152, 4304, device="cuda").bfloat16()
    x = torch.randn(tokens, 1152, device="cuda").bfloat16()
    with torch.inference_mode():
        weight, bias = linear.weight.double(), linear.bias.double()
        exact = gelu_tanh(F.linear(x.double(), weight, bias))
        fused, plain = rise_fused(x, linear, "gelu_tanh"), gelu_tanh(linear(x))
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 2816), (33, 1025), (4096, 171)])
def test_silu_times_is_nearer_to_exact_than_its_plain_twin(dtype, tokens: int, width: int):
    from packvit.kernels import silu_times

    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, 2 * width, device="cuda")).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    exact = F.silu(gate) * up
    fused, plain = silu_times(x), F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    assert fused.dtype == dtype
    if dtype == torch.float32:  # the last bits are luck there; the encoder fuses in 16 bits alone
        torch.testing.assert_close(fused.double(), exact, atol=1e-6, rtol=1e-6)
    else:
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_silu_times_writes_every_element_and_nan_stays_in_its_row():
    from packvit.kernels import silu_times

    x = torch.randn(5, 2 * 1500, device="cuda")
    before = silu_times(x)
    assert before.isfinite().all()
    x[2, 7] = float("nan")
    after = silu_times(x)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().sum() == 1


def norms(width: int, device: str, dtype: torch.dtype) -> list[RMSNorm | nn.LayerNorm]:
    made = [RMSNorm(width, 1e-5), nn.LayerNorm(width, 1e-6)]
    for norm in made:
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return [norm.to(device, dtype) for norm in made]


def stands_for(rows: Rows8) -> Tensor:
    return rows.values.double() * rows.scale.double()


def assert_as_near_as_8_bits_are(found: Rows8, exact: Tensor) -> None:
    """Half a step of 3 mantissa bits, or of the subnormals below 2 ** -6, and fp32's rounding."""
    largest = exact.abs().amax(1, keepdim=True)
    allowed = torch.maximum(exact.abs() / 16, largest / 448 / 1024) * 1.001 + 1e-5 * largest
    assert ((stands_for(found) - exact).abs() <= allowed).all()


def test_a_wrapped_matrix_is_never_stepped_past():
    """What wraps a linear layer changes what it does: a fused step must not reach through it."""

    class Doubled(nn.Module):
        def __init__(self, inner: Linear) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    inner, x = Linear(8, 16), torch.randn(3, 8)
    found = rise(x, Doubled(inner), "gelu_tanh", Linear(16, 8))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, gelu_tanh(2 * inner(x)))


def test_8_bits_survive_an_outlier_channel():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 100
    assert_as_near_as_8_bits_are(quantise(x), x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 1024), (33, 1025), (4096, 1152)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm_is_nearer_to_exact_than_its_plain_twin(dtype, tokens: int, width: int, adds):
    torch.manual_seed(tokens)
    stream, delta = (3 * torch.randn(2, tokens, width, device="cuda")).to(dtype)
    given = delta if adds else None
    for norm in norms(width, "cuda", dtype):
        with torch.inference_mode():
            summed, fused = STEPS["add_norm"]["fused"](stream, given, norm)
            same, plain = STEPS["add_norm"]["plain"](stream, given, norm)
            exact = norm.double()(same.double())
            norm.to(dtype)
        assert torch.equal(summed, same)
        assert fused.dtype == dtype
        error = (fused.double() - exact).norm()
        assert error <= 1.001 * (plain.double() - exact).norm()


@pytest.mark.gpu
def test_nan_stays_in_its_row_of_add_norm():
    stream, delta = torch.randn(2, 5, 1500, device="cuda").bfloat16()
    [norm, _] = norms(1500, "cuda", torch.bfloat16)
    with torch.inference_mode():
        _, before = STEPS["add_norm"]["fused"](stream, delta, norm)
        _, eight = STEPS["add_norm"]["float8"](stream, delta, norm)
        stream[2, 7] = float("nan")
        summed, after = STEPS["add_norm"]["fused"](stream, delta, norm)
        _, eight_after = STEPS["add_norm"]["float8"](stream, delta, norm)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().all()
    assert summed[2].isnan().sum() == 1
    assert torch.equal(stands_for(eight)[rest], stands_for(eight_after)[rest])
    assert stands_for(eight_after)[2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (77, 2816), (33, 1040), (500, 4304)])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_steps_to_8_bits_are_as_near_as_8_bits_are(tokens: int, width: int, outlier: float):
    from packvit.kernels import activate_8, quantise_8

    torch.manual_seed(tokens)
    x = torch.randn(tokens, 2 * width, device="cuda")
    x[:, 3] *= outlier
    x = x.bfloat16()
    assert_as_near_as_8_bits_are(Rows8(*quantise_8(x)), x.double())
    for name, activation in ACTIVATIONS.items():
        exact = activation(x.double())
        assert_as_near_as_8_bits_are(Rows8(*activate_8(x, name, False)), exact)
        gate, up = x.double().chunk(2, 1)
        exact = activation(gate) * up
        assert_as_near_as_8_bits_are(Rows8(*activate_8(x, name, True)), exact)
    for norm in norms(2 * width, "cuda", torch.bfloat16):
        with torch.inference_mode():
            summed, found = STEPS["add_norm"]["float8"](x, x, norm)
            exact = norm.double()(summed.double())
        assert_as_near_as_8_bits_are(found, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_a_matmul_in_8_bits_is_that_of_its_rounded_operands(bias: bool):
    torch.manual_seed(0)
    linear = Linear(1024, 2816, bias=bias, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(333, 1024, device="cuda").bfloat16()
    eight = Linear8(linear)
    weight = eight.weight.double() * eight.scale.double().T
    exact = stands_for(quantise(x)) @ weight.T + (linear.bias.double() if bias else 0)
    with torch.inference_mode():
        found = eight(x).double()
        _, normed = add_norm(x, None, norms(1024, "cuda", torch.bfloat16)[0], eight)
    assert isinstance(normed, Rows8)
    assert (found - exact).norm() <= 6e-3 * exact.norm()  # of bf16's rounding, and fast sums
