"""Matmuls in 8 bits beside float64 and the plain model."""

import sys
from types import ModuleType
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from plain_steps import add_norm, made_of, norms, stands_for, swiglu
from torch import Tensor, nn

from packvit.config import Activation, TransformerConfig
from packvit.families import FAMILIES
from packvit.fast.fp8 import (
    LARGEST,
    LinearActFp8,
    LinearFp8,
    QuantizedRows,
    linear_act_fp8,
    mlp_to_fp8,
    quantize,
)
from packvit.fast.steps import Delta, mlp_hidden
from packvit.model.activations import ACTIVATIONS
from packvit.model.layers import MLP, GatedMLP, split_gate_up
from packvit.model.linear import Linear


def assert_as_near_as_8_bits_are(found: QuantizedRows, exact: Tensor) -> None:
    """Half a step of 3 mantissa bits, or of the subnormals below 2 ** -6, and fp32's rounding."""
    largest = exact.abs().amax(1, keepdim=True)
    allowed = torch.maximum(exact.abs() / 16, largest / 448 / 1024) * 1.001 + 1e-5 * largest
    assert ((stands_for(found) - exact).abs() <= allowed).all()


def test_8_bits_survive_an_outlier_channel():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 100
    assert_as_near_as_8_bits_are(quantize(x), x.double())


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (77, 2816), (33, 1040), (500, 4304)])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_steps_to_8_bits_are_as_near_as_8_bits_are(tokens: int, width: int, outlier: float):
    from packvit.fast.kernels.fp8 import activate_fp8, quantize_fp8

    torch.manual_seed(tokens)
    x = torch.randn(tokens, 2 * width, device="cuda")
    x[:, 3] *= outlier
    x = x.bfloat16()
    assert_as_near_as_8_bits_are(QuantizedRows(*quantize_fp8(x, None, False)), x.double())
    for name, activation in ACTIVATIONS.items():
        exact = activation(x.double())
        assert_as_near_as_8_bits_are(QuantizedRows(*activate_fp8(x, name, False, None)), exact)
        gates, up = split_gate_up(x.double())
        exact = activation(gates) * up
        assert_as_near_as_8_bits_are(QuantizedRows(*activate_fp8(x, name, True, None)), exact)
    reader = LinearFp8(nn.Linear(2 * width, 16, device="cuda"))
    for norm in norms(2 * width, "cuda", torch.bfloat16):
        with torch.inference_mode():
            summed, found = add_norm(x, Delta(x, None), norm, reader, False)
            exact = norm.double()(summed.double())
        assert_as_near_as_8_bits_are(found, exact)


def first_of_an_mlp(gated: bool, bias: bool, odd: str, device: str) -> tuple[Linear, Tensor]:
    """Return an MLP's first matrix and tokens for it, with something odd about one of them."""
    draw = torch.Generator().manual_seed(0)
    linear = Linear(192, 320 * (1 + gated), bias=bias)
    x = torch.randn(300, 192, generator=draw)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=draw) / 192**0.5)
        if odd == "channels":  # that stand out, undone by what reads them
            x[:, :3] *= 100
            linear.weight[:, :3] /= 100
        elif odd == "rows":
            linear.weight[:5] *= 100
        elif odd == "zeros":
            x[7], linear.weight[3], linear.weight[:, 5] = 0, 0, 0
    return linear.to(device, torch.bfloat16), x.to(device, torch.bfloat16)


mlps = pytest.mark.parametrize(
    ("gated", "bias", "odd"),
    [
        (True, False, "nothing"),
        (True, True, "channels"),
        (False, True, "channels"),
        (True, False, "rows"),
        (False, False, "rows"),
        (True, False, "zeros"),
        (False, True, "zeros"),
    ],
)


def by_bound(
    linear: Linear, x: Tensor, activation: Activation, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an MLP's first half makes over its channels, the same in 8 bits by its reach, and
    the largest number that is rounded to them.
    """
    eight = LinearActFp8(linear, gated)
    weight = eight.weight.double() * eight.scale.double().T
    biases = None if linear.bias is None else linear.bias.double()
    made = made_of(F.linear(stands_for(quantize(x)), weight, biases), activation, gated)
    made = made / eight.bound.channels.double()
    scale = eight.bound.scales(x).double()
    found = (made / scale).float().to(torch.float8_e4m3fn).double() * scale
    return made, found, (made / scale).abs().max()


@mlps
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_made_of_tokens_stays_in_reach_and_costs_no_bits(
    gated: bool, bias: bool, odd: str, activation: Activation
):
    linear, x = first_of_an_mlp(gated, bias, odd, "cpu")
    made, found, largest = by_bound(linear, x, activation, gated)
    assert largest <= LARGEST
    by_largest = stands_for(quantize(made.float()))
    # By a row's largest that one is rounded by nothing, which is luck of a few hundredths.
    assert (found - made).norm() <= 1.2 * (by_largest - made).norm()


@pytest.mark.parametrize(
    ("gated", "times", "more"),
    [(True, 3, 1.5), (False, 10, 1.1)],
)
def test_a_direction_that_tokens_share_and_no_row_reads_costs_little(
    gated: bool, times: float, more: float
):
    """At AIMv2-large's width; `times` as long as the rest. docs/numerics.md says what 10 cost."""
    draw = torch.Generator().manual_seed(0)
    linear = Linear(1024, 512 * (1 + gated), bias=False)
    x, shared = (torch.randn(rows, 1024, generator=draw) for rows in (64, 1))
    shared = shared / shared.norm()
    weight = torch.randn(linear.weight.shape, generator=draw) / 32
    with torch.no_grad():
        linear.weight.copy_(weight - weight @ shared.T @ shared)
    x = x + times * 32 * shared
    made, found, _ = by_bound(linear, x / x.square().mean(1, keepdim=True).sqrt(), "silu", gated)
    assert (found - made).norm() <= more * 0.026 * made.norm()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def mlp_of(first: nn.Module, second: nn.Module, gated: bool) -> Any:
    sizes = TransformerConfig(
        width=192,
        layers=1,
        heads=4,
        mlp_width=320,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        gated=gated,
    )
    mlp: Any = GatedMLP(sizes) if gated else MLP(sizes)
    setattr(mlp, "gate_up" if gated else "up", first)
    mlp.down = second
    return mlp


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("wrapped", ["none", "first", "second", "both"])
def test_mlps_in_8_bits_may_be_wrapped(monkeypatch: pytest.MonkeyPatch, gated: bool, wrapped: str):
    """By reference implementations: the second matrix has the first one's channels."""
    eight: Any = ModuleType("packvit.fast.kernels.fp8")
    eight.quantize_fp8 = lambda x, reach, squared: quantize(x)[:2]
    eight.activate_fp8 = lambda hidden, activation, gated, channels: quantize(
        made_of(hidden.float(), activation, gated) / (1 if channels is None else channels)
    )[:2]
    gates: Any = ModuleType("packvit.fast.kernels.gates")
    gates.silu_mul = swiglu
    monkeypatch.setitem(sys.modules, "packvit.fast.kernels.gates", gates)
    monkeypatch.setitem(sys.modules, "packvit.fast.kernels.fp8", eight)
    monkeypatch.setattr(torch, "_scaled_mm", plain_scaled_mm)
    monkeypatch.setattr("packvit.fast.fp8.is_hopper", lambda device: True)
    first, x = first_of_an_mlp(gated, True, "rows", "cpu")
    second = Linear(320, 192).bfloat16()
    exact = second(made_of(first(x), "silu", gated)).float()
    up, down = mlp_to_fp8(first, second, gated=gated)
    assert isinstance(up, LinearActFp8)
    up.register_forward_hook(lambda module, given, out: None)  # so that its own kernel is not asked
    reads = Wrapped(up) if wrapped in ("first", "both") else up
    last = Wrapped(down) if wrapped in ("second", "both") else down
    with torch.no_grad():
        found = last(mlp_hidden(x, mlp_of(reads, last, gated), False)).float()
    assert (found - exact).norm() <= 0.1 * exact.norm()


def plain_scaled_mm(values, weight, scale_a, scale_b, bias, out_dtype, use_fast_accum) -> Tensor:
    product = (values.float() * scale_a) @ (weight.float() * scale_b)
    return (product if bias is None else product + bias.float()).to(out_dtype)


@pytest.mark.parametrize("gated", [True, False])
def test_reach_is_exactly_reached(gated: bool):
    """A token along a row of the matrix comes as near to its bound as any can."""
    linear = Linear(64, 32 * (1 + gated), bias=False)
    if gated:  # gate and up alike, so that one token serves both
        linear.weight.data = linear.weight.data[::2].repeat_interleave(2, 0)
    eight = LinearActFp8(linear, gated)
    whole = eight.weight.double() * eight.scale.double().T
    r = whole.square().mean(0).sqrt()
    x = 1e4 * whole[:: 2 if gated else 1] / r.square()
    made = made_of(x @ whole.T, "silu", gated).diagonal()
    bound = eight.bound.scales(x.float())[:, 0].double() * eight.bound.channels.double()
    torch.testing.assert_close(
        made / bound, torch.full_like(made, LARGEST / 1.2), rtol=1e-4, atol=0
    )


@pytest.mark.gpu
@mlps
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_an_mlp_in_8_bits_is_as_near_with_its_activation_in_the_matmul(
    gated: bool, bias: bool, odd: str, activation: Activation
):
    linear, x = first_of_an_mlp(gated, bias, odd, "cuda")
    down = Linear(320, 192, device="cuda", dtype=torch.bfloat16)
    first, second = mlp_to_fp8(linear, down, gated=gated)
    assert isinstance(first, LinearActFp8)
    rows = first.rows(x)
    assert rows.output_scale is not None
    torch.testing.assert_close(rows.output_scale, first.bound.scales(x))
    weight = first.weight.double() * first.scale.double().T
    biases = linear.bias.double() if bias else None
    exact = made_of(F.linear(stands_for(rows), weight, biases), activation, gated)
    channels = first.bound.channels.double()
    with torch.inference_mode():
        fused = linear_act_fp8(rows, first, activation, gated, second)
        assert isinstance(fused, QuantizedRows)
        assert torch.equal(
            fused.values, linear_act_fp8(rows, first, activation, gated, second).values
        )
        first.register_forward_hook(lambda module, given, out: None)
        apart = linear_act_fp8(rows, first, activation, gated, second)  # a hook is not stepped past
    assert isinstance(apart, QuantizedRows)
    exact = exact / channels
    error, other = ((stands_for(made) - exact).norm() for made in (fused, apart))
    assert not torch.equal(fused.scale, apart.scale)
    assert error <= 1.2 * other
    for norm in norms(192, "cuda", torch.bfloat16):
        with torch.inference_mode():
            _, after_norm = add_norm(x, None, norm, first, False)
            normed = norm.float()(x.float())
        torch.testing.assert_close(
            after_norm.output_scale, first.bound.scales(normed), rtol=1e-4, atol=1e-9
        )


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_a_row_of_a_matmul_to_8_bits_does_not_know_of_other_rows(gated: bool):
    torch.manual_seed(0)
    linear = Linear(1024, 2816 * (1 + gated), bias=False, device="cuda", dtype=torch.bfloat16)
    down = Linear(2816, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    first, second = mlp_to_fp8(linear, down, gated=gated)
    assert isinstance(first, LinearActFp8)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()
    with torch.inference_mode():
        whole = stands_for(linear_act_fp8(x, first, "silu", gated, second))
        for start, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            part = linear_act_fp8(x[start : start + count].clone(), first, "silu", gated, second)
            assert torch.equal(stands_for(part), whole[start : start + count])
        x[3] = float("nan")
        after = stands_for(linear_act_fp8(x, first, "silu", gated, second))
    assert torch.equal(after[4:], whole[4:])
    assert after[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_a_matmul_in_8_bits_is_that_of_its_rounded_operands(bias: bool):
    torch.manual_seed(0)
    linear = Linear(1024, 2816, bias=bias, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(333, 1024, device="cuda").bfloat16()
    eight = LinearFp8(linear)
    weight = eight.weight.double() * eight.scale.double().T
    exact = stands_for(quantize(x)) @ weight.T + (linear.bias.double() if bias else 0)
    with torch.inference_mode():
        found = eight(x).double()
        _, normed = add_norm(x, None, norms(1024, "cuda", torch.bfloat16)[0], eight, False)
    assert isinstance(normed, QuantizedRows)
    assert (found - exact).norm() <= 6e-3 * exact.norm()  # of bf16's rounding, and fast sums


def test_fp8_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="fp8 needs a CUDA device and the encoder is on cpu"):
        FAMILIES[0].from_transformers(reference.build("aimv2"), fp8=True)
