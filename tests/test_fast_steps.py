"""Fused steps beside their reference implementations, which are the plain model's modules."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.config import Activation, TransformerConfig
from packvit.fast import steps
from packvit.fast.autograd import LinearAct, SiluMul
from packvit.fast.fp8 import (
    LARGEST,
    LinearActFp8,
    LinearFp8,
    QuantizedRows,
    linear_act_fp8,
    mlp_to_fp8,
    quantize,
)
from packvit.fast.steps import Delta, add_linear_, linear_gelu_tanh, mlp_hidden, project
from packvit.model.activations import ACTIVATIONS, gelu_tanh
from packvit.model.layers import MLP, GatedMLP, split_gate_up
from packvit.model.linear import Linear
from packvit.model.norms import RMSNorm
from packvit.model.positions import rotate

add_norm: Any = steps.add_norm  # whose second result is as its reader wants it


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
@pytest.mark.parametrize("activation", ACTIVATIONS)
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


def swiglu(gate_up: Tensor) -> Tensor:
    gates, up = split_gate_up(gate_up)
    return F.silu(gates) * up


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
    ("tokens", "width", "mlp"), [(1, 64, 8), (77, 1024, 2816), (300, 1032, 136), (5000, 384, 1024)]
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
    assert (found.double() - exact).norm() <= (plain.double() - exact).norm()


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


def norms(width: int, device: str, dtype: torch.dtype) -> list[RMSNorm | nn.LayerNorm]:
    made = [RMSNorm(width, 1e-5), nn.LayerNorm(width, 1e-6)]
    for norm in made:
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return [norm.to(device, dtype) for norm in made]


def stands_for(rows: QuantizedRows) -> Tensor:
    return rows.values.double() * rows.scale.double()


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 1024), (33, 1025), (4096, 1152)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm_is_nearer_to_exact_than_the_plain_model(dtype, tokens: int, width: int, adds):
    torch.manual_seed(tokens)
    stream, delta = (3 * torch.randn(2, tokens, width, device="cuda")).to(dtype)
    given = Delta(delta, None) if adds else None
    for norm in norms(width, "cuda", dtype):
        with torch.inference_mode():
            summed, fused = add_norm(stream, given, norm, norm, False)
            same = stream if given is None else stream + delta
            plain = norm(same)
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
    reader = LinearFp8(nn.Linear(1500, 16, device="cuda"))
    with torch.inference_mode():
        _, before = add_norm(stream, Delta(delta, None), norm, norm, False)
        _, eight = add_norm(stream, Delta(delta, None), norm, reader, False)
        stream[2, 7] = float("nan")
        summed, after = add_norm(stream, Delta(delta, None), norm, norm, False)
        _, eight_after = add_norm(stream, Delta(delta, None), norm, reader, False)
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


def made_of(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gates, up = split_gate_up(hidden)
    return ACTIVATIONS[activation](gates) * up


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
@pytest.mark.parametrize("activation", ACTIVATIONS)
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
def test_rotary_positions_in_place_are_nearer_to_exact_than_the_plain_model(
    dtype, heads: int, head_dim: int
):
    from packvit.fast.attention import RotateQueriesAndKeys, rotate_queries_and_keys_

    torch.manual_seed(heads)
    angles = 3 * torch.randn(333, head_dim // 2, device="cuda").tile(2)
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
def test_a_layer_scale_within_the_norm_is_nearer_to_exact_than_a_pass_of_its_own(dtype):
    torch.manual_seed(0)
    x, delta = torch.randn(2, 300, 1024, device="cuda").to(dtype)
    factor = torch.randn(1024, device="cuda").to(dtype)
    for norm in norms(1024, "cuda", dtype):
        with torch.inference_mode():
            summed, _ = add_norm(x, Delta(delta, factor), norm, norm, False)
            exact = x.double() + delta.double() * factor.double()
            plain = x + delta * factor
        assert (summed.double() - exact).norm() <= (plain.double() - exact).norm()
