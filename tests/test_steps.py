"""Fused steps beside their plain twins."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.config import Activation
from packvit.fast.fp8 import LARGEST, Linear8, Rise8, Rows8, quantise, to_8
from packvit.fast.steps import (
    ACTIVATIONS,
    STEPS,
    RMSNorm,
    Way,
    add,
    add_norm,
    can_add,
    gate,
    gelu_tanh,
    in_turns,
    matmul_8,
    may_fuse,
    rise,
    rise_fused,
)
from packvit.model.linear import Linear


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


WAYS: tuple[Way, Way] = ("taught", "plain")


def swiglu(gate_up: Tensor) -> Tensor:
    gates, up = in_turns(gate_up)
    return F.silu(gates) * up


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 2816), (33, 1025), (4096, 171)])
def test_silu_times_is_nearer_to_exact_than_its_plain_twin(dtype, tokens: int, width: int):
    from packvit.fast.kernels.gates import silu_times

    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, 2 * width, device="cuda")).to(dtype)
    exact, fused, plain = swiglu(x.double()), silu_times(x), swiglu(x)
    assert fused.dtype == dtype
    if dtype == torch.float32:  # the last bits are luck there; the encoder fuses in 16 bits alone
        torch.testing.assert_close(fused.double(), exact, atol=1e-6, rtol=1e-6)
    else:
        assert (fused.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_silu_times_writes_every_element_and_nan_stays_in_its_row():
    from packvit.fast.kernels.gates import silu_times

    x = torch.randn(5, 2 * 1500, device="cuda")
    before = silu_times(x)
    assert before.isfinite().all()
    x[2, 7] = float("nan")
    after = silu_times(x)
    rest = [0, 1, 3, 4]
    assert torch.equal(before[rest], after[rest])
    assert after[2].isnan().sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "mlp"), [(1, 64, 8), (77, 1024, 2816), (300, 1032, 136), (5000, 384, 1024)]
)
def test_swiglu_in_the_epilogue_is_nearer_to_exact_than_its_plain_twin(
    dtype, bias: bool, tokens: int, width: int, mlp: int
):
    torch.manual_seed(tokens)
    gate_up = Linear(width, 2 * mlp, bias=bias, device="cuda", dtype=dtype)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    with torch.inference_mode():
        found = STEPS["gate"]["fused"](x, gate_up, "silu")
        plain = STEPS["gate"]["plain"](x, gate_up, "silu")
        biases = gate_up.bias.double() if bias else None
        exact = swiglu(F.linear(x.double(), gate_up.weight.double(), biases))
    assert (found.double() - exact).norm() <= (plain.double() - exact).norm()


@pytest.mark.gpu
def test_a_row_of_swiglu_does_not_know_of_other_rows():
    torch.manual_seed(0)
    gate_up = Linear(1024, 2 * 2816, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()
    with torch.inference_mode():
        whole = STEPS["gate"]["fused"](x, gate_up, "silu")
        for first, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            part = STEPS["gate"]["fused"](x[first : first + count].clone(), gate_up, "silu")
            assert torch.equal(part, whole[first : first + count])
        x[3] = float("nan")
        after = STEPS["gate"]["fused"](x, gate_up, "silu")
    assert torch.equal(after[4:], whole[4:])
    assert after[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_what_a_matmul_adds_is_nearer_to_exact_than_its_plain_twin(dtype, tokens: int):
    torch.manual_seed(tokens)
    linear = Linear(2816, 1024, bias=False, device="cuda", dtype=dtype)
    x = torch.randn(tokens, 2816, device="cuda").to(dtype)
    stream = torch.randn(tokens, 1024, device="cuda").to(dtype)
    exact = stream.double() + x.double() @ linear.weight.double().T
    with torch.inference_mode():
        plain, delta = STEPS["add"]["plain"](stream, x, linear, nn.Identity())
        plain = plain + delta
        found, rest = add(stream, x, linear, nn.Identity())
    assert rest is None
    assert (found.double() - exact).norm() <= (plain.double() - exact).norm()


def test_what_a_matmul_cannot_add_is_left_to_the_next_norm(monkeypatch: pytest.MonkeyPatch):
    """With a bias, a scale, a wrapper around it, a hook, gradients on, or on a CPU."""
    x, stream, none = torch.randn(3, 8), torch.randn(3, 8), nn.Identity()
    plain, biased, watched = Linear(8, 8, bias=False), Linear(8, 8), Linear(8, 8, bias=False)
    wrapped = nn.Sequential(plain)
    watched.register_forward_hook(lambda module, given, out: None)
    with torch.inference_mode():
        same, delta = add(stream, x, plain, none)
        assert same is stream
        assert isinstance(delta, Tensor)
        assert torch.equal(delta, plain(x))
    monkeypatch.setattr("packvit.fast.steps.sixteen_bits", lambda *tensors: True)
    with torch.inference_mode():
        for linear in (biased, wrapped, watched):
            assert not can_add(stream, x, linear, none)
        assert not can_add(stream, x, plain, nn.Dropout())
        assert can_add(stream, x, plain, none)
        kept, rest = add(stream.clone(), x, plain, none)
        assert rest is None
        torch.testing.assert_close(kept, stream + plain(x))
    plain.requires_grad_(False)
    assert not can_add(stream, x, plain, none)


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


def test_a_watched_norm_is_never_stepped_past(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("packvit.fast.steps.choose", lambda *tensors: "fused")
    called, (norm, _) = [], norms(16, "cpu", torch.float32)
    norm.register_forward_hook(lambda module, given, out: called.append(out) or out + 1)
    x = torch.randn(3, 16)
    for reader in (Linear(16, 16), Linear8(Linear(16, 16))):
        stream, normed = add_norm(x, x, norm, reader)
        assert torch.equal(stream, x + x)
        assert isinstance(normed, Tensor)
        assert torch.equal(normed, called[-1] + 1)
    assert len(called) == 2


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
    reader = Linear8(nn.Linear(1500, 16, device="cuda"))
    with torch.inference_mode():
        _, before = STEPS["add_norm"]["fused"](stream, delta, norm)
        _, eight = STEPS["add_norm"]["float8"](stream, delta, norm, reader)
        stream[2, 7] = float("nan")
        summed, after = STEPS["add_norm"]["fused"](stream, delta, norm)
        _, eight_after = STEPS["add_norm"]["float8"](stream, delta, norm, reader)
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
    from packvit.fast.kernels.eight import activate_8, quantise_8

    torch.manual_seed(tokens)
    x = torch.randn(tokens, 2 * width, device="cuda")
    x[:, 3] *= outlier
    x = x.bfloat16()
    assert_as_near_as_8_bits_are(Rows8(*quantise_8(x, None, False)), x.double())
    for name, activation in ACTIVATIONS.items():
        exact = activation(x.double())
        assert_as_near_as_8_bits_are(Rows8(*activate_8(x, name, False, None)), exact)
        gates, up = in_turns(x.double())
        exact = activation(gates) * up
        assert_as_near_as_8_bits_are(Rows8(*activate_8(x, name, True, None)), exact)
    reader = Linear8(nn.Linear(2 * width, 16, device="cuda"))
    for norm in norms(2 * width, "cuda", torch.bfloat16):
        with torch.inference_mode():
            summed, found = STEPS["add_norm"]["float8"](x, x, norm, reader)
            exact = norm.double()(summed.double())
        assert_as_near_as_8_bits_are(found, exact)


def made_of(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gates, up = in_turns(hidden)
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


def by_reach(
    linear: Linear, x: Tensor, activation: Activation, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an MLP's first half makes over its channels, the same in 8 bits by its reach, and
    the largest number that is rounded to them.
    """
    eight = Rise8(linear, gated)
    weight = eight.weight.double() * eight.scale.double().T
    biases = None if linear.bias is None else linear.bias.double()
    made = made_of(F.linear(stands_for(quantise(x)), weight, biases), activation, gated)
    made = made / eight.reach.channels.double()
    scale = eight.reach.scales(x).double()
    found = (made / scale).float().to(torch.float8_e4m3fn).double() * scale
    return made, found, (made / scale).abs().max()


@mlps
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_made_of_tokens_stays_in_reach_and_costs_no_bits(
    gated: bool, bias: bool, odd: str, activation: Activation
):
    linear, x = first_of_an_mlp(gated, bias, odd, "cpu")
    made, found, largest = by_reach(linear, x, activation, gated)
    assert largest <= LARGEST
    by_largest = stands_for(quantise(made.float()))
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
    made, found, _ = by_reach(linear, x / x.square().mean(1, keepdim=True).sqrt(), "silu", gated)
    assert (found - made).norm() <= more * 0.026 * made.norm()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("wrapped", ["none", "first", "second", "both"])
def test_mlps_in_8_bits_may_be_wrapped(monkeypatch: pytest.MonkeyPatch, gated: bool, wrapped: str):
    """With plain twins for the kernels, since the second matrix has the first one's channels."""
    eight: Any = ModuleType("packvit.fast.kernels.eight")
    eight.quantise_8 = lambda x, reach, squared: quantise(x)[:2]
    eight.activate_8 = lambda hidden, activation, gated, channels: quantise(
        made_of(hidden.float(), activation, gated) / (1 if channels is None else channels)
    )[:2]
    monkeypatch.setitem(sys.modules, "packvit.fast.kernels.eight", eight)
    monkeypatch.setattr(torch, "_scaled_mm", plain_scaled_mm)
    monkeypatch.setattr("packvit.fast.fp8.is_hopper", lambda device: True)
    first, x = first_of_an_mlp(gated, True, "rows", "cpu")
    second = Linear(320, 192).bfloat16()
    exact = second(made_of(first(x), "silu", gated)).float()
    up, down = to_8(first, second, gated)
    assert isinstance(up, Rise8)
    up.register_forward_hook(lambda module, given, out: None)  # so that its own kernel is not asked
    reads = Wrapped(up) if wrapped in ("first", "both") else up
    last = Wrapped(down) if wrapped in ("second", "both") else down
    with torch.no_grad():
        found = last((gate if gated else rise)(x, reads, "silu", last)).float()
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
    eight = Rise8(linear, gated)
    whole = eight.weight.double() * eight.scale.double().T
    r = whole.square().mean(0).sqrt()
    x = 1e4 * whole[:: 2 if gated else 1] / r.square()
    made = made_of(x @ whole.T, "silu", gated).diagonal()
    bound = eight.reach.scales(x.float())[:, 0].double() * eight.reach.channels.double()
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
    first, second = to_8(linear, Linear(320, 192, device="cuda", dtype=torch.bfloat16), gated)
    assert isinstance(first, Rise8)
    step = gate if gated else rise
    rows = first.rows(x)
    assert rows.after is not None
    torch.testing.assert_close(rows.after, first.reach.scales(x))
    weight = first.weight.double() * first.scale.double().T
    biases = linear.bias.double() if bias else None
    exact = made_of(F.linear(stands_for(rows), weight, biases), activation, gated)
    channels = first.reach.channels.double()
    with torch.inference_mode():
        fused = step(rows, first, activation, second)
        assert isinstance(fused, Rows8)
        assert torch.equal(fused.values, matmul_8(rows, first, activation, second).values)
        first.register_forward_hook(lambda module, given, out: None)
        apart = step(rows, first, activation, second)  # a hook is not stepped past
    assert isinstance(apart, Rows8)
    exact = exact / channels
    error, other = ((stands_for(made) - exact).norm() for made in (fused, apart))
    assert not torch.equal(fused.scale, apart.scale)
    assert error <= 1.2 * other
    for norm in norms(192, "cuda", torch.bfloat16):
        with torch.inference_mode():
            _, after_norm = STEPS["add_norm"]["float8"](x, None, norm, first)
            normed = STEPS["add_norm"]["plain"](x.float(), None, norm.float())[1]
        torch.testing.assert_close(
            after_norm.after, first.reach.scales(normed), rtol=1e-4, atol=1e-9
        )


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_a_row_of_a_matmul_to_8_bits_does_not_know_of_other_rows(gated: bool):
    torch.manual_seed(0)
    linear = Linear(1024, 2816 * (1 + gated), bias=False, device="cuda", dtype=torch.bfloat16)
    down = Linear(2816, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    first, second = to_8(linear, down, gated)
    assert isinstance(first, Rise8)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()
    with torch.inference_mode():
        whole = stands_for(matmul_8(x, first, "silu", second))
        for start, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            part = matmul_8(x[start : start + count].clone(), first, "silu", second)
            assert torch.equal(stands_for(part), whole[start : start + count])
        x[3] = float("nan")
        after = stands_for(matmul_8(x, first, "silu", second))
    assert torch.equal(after[4:], whole[4:])
    assert after[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_tamed_and_others_left(dtype: torch.dtype):
    from packvit.fast.kernels.heads import tame

    torch.manual_seed(0)
    qkv = torch.randn(1000, 3, 6, 72, device="cuda").to(dtype)
    qkv[5], qkv[64:200], qkv[999] = float("nan"), float("inf"), float("-inf")
    if dtype == torch.float16:
        qkv[300, 2, 3, 7] = float("inf")  # a sum of its own that overflows
    before = qkv.clone()
    tame(qkv[:, 2], qkv[:, 1])
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
    eight = Linear8(linear)
    weight = eight.weight.double() * eight.scale.double().T
    exact = stands_for(quantise(x)) @ weight.T + (linear.bias.double() if bias else 0)
    with torch.inference_mode():
        found = eight(x).double()
        _, normed = add_norm(x, None, norms(1024, "cuda", torch.bfloat16)[0], eight)
    assert isinstance(normed, Rows8)
    assert (found - exact).norm() <= 6e-3 * exact.norm()  # of bf16's rounding, and fast sums


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (77, 1024), (33, 1025), (4096, 1152)])
@pytest.mark.parametrize("adds", [True, False])
def test_gradients_of_add_norm_are_as_near_to_exact_as_its_plain_twins(
    dtype, tokens: int, width: int, adds: bool
):
    torch.manual_seed(tokens)
    stream, delta, *pulls = (torch.randn(4, tokens, width, device="cuda")).to(dtype)

    def gradients(way: Way, norm: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype, copy=True).requires_grad_() for x in (stream, delta)[: 1 + adds]]
        outs = STEPS["add_norm"][way](given[0], given[1] if adds else None, norm)
        loss = [(out * pull.to(dtype)).sum() for out, pull in zip(outs, pulls, strict=True)]
        return list(torch.autograd.grad(loss[0] + loss[1], [*given, *norm.parameters()]))

    for norm in norms(width, "cuda", dtype):
        found, plain = (gradients(way, norm, dtype) for way in WAYS)
        exact = gradients("plain", norm.double(), torch.float64)
        for ours, theirs, truth in zip(found, plain, exact, strict=True):
            assert ours.dtype == dtype
            error = (ours.double() - truth).norm()
            # What is summed is rounded alike; its bits beside that are luck for few tokens.
            assert error <= 1.05 * (theirs.double() - truth).norm() + 2e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "mlp"), [(1, 8), (77, 2816), (4096, 171)])
def test_gradients_of_swiglu_are_as_near_to_exact_as_its_plain_twins(
    tokens: int, mlp: int, bias: bool
):
    torch.manual_seed(tokens)
    gate_up = Linear(64, 2 * mlp, bias=bias, device="cuda", dtype=torch.bfloat16)
    x, pull = torch.randn(tokens, 64, device="cuda"), torch.randn(tokens, mlp, device="cuda")

    def gradients(way: Way, dtype: torch.dtype) -> list[Tensor]:
        given = x.bfloat16().to(dtype, copy=True).requires_grad_()
        out = STEPS["gate"][way](given, gate_up, "silu")
        loss = (out * pull.bfloat16().to(dtype)).sum()
        return list(torch.autograd.grad(loss, [given, *gate_up.parameters()]))

    found, plain = (gradients(way, torch.bfloat16) for way in WAYS)
    gate_up.double()
    for ours, theirs, truth in zip(found, plain, gradients("plain", torch.float64), strict=True):
        error = (ours.double() - truth).norm()
        assert error <= 1.05 * (theirs.double() - truth).norm() + 4e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "mlp"), [(1, 8), (77, 4304), (4096, 171)])
def test_gradients_of_rise_are_as_near_to_exact_as_its_plain_twins(
    tokens: int, mlp: int, activation: Activation
):
    torch.manual_seed(tokens)
    up = Linear(64, mlp, device="cuda", dtype=torch.bfloat16)
    x, pull = 3 * torch.randn(tokens, 64, device="cuda"), torch.randn(tokens, mlp, device="cuda")

    def gradients(way: Way, dtype: torch.dtype) -> list[Tensor]:
        given = x.bfloat16().to(dtype, copy=True).requires_grad_()
        out = STEPS["rise"][way](given, up, activation)
        loss = (out * pull.bfloat16().to(dtype)).sum()
        return list(torch.autograd.grad(loss, [given, *up.parameters()]))

    found, plain = (gradients(way, torch.bfloat16) for way in WAYS)
    up.double()
    for ours, theirs, truth in zip(found, plain, gradients("plain", torch.float64), strict=True):
        error = (ours.double() - truth).norm()
        assert error <= 1.05 * (theirs.double() - truth).norm() + 4e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "wide"), [(72, 96), (96, 72), (80, 96), (8, 32)])
def test_heads_are_widened_with_zeros_and_cut_again(depth: int, wide: int):
    from packvit.fast.kernels.heads import widen

    whole = torch.randn(77, 3, 5, depth, device="cuda").bfloat16()
    expected = F.pad(whole, (0, wide - depth))
    assert torch.equal(widen(whole, wide), expected)
    assert torch.equal(widen(whole[:, 1], wide), expected[:, 1])


@pytest.mark.gpu
def test_training_in_16_bits_on_cuda_takes_the_steps_that_know_their_derivative():
    [norm, _] = norms(64, "cuda", torch.bfloat16)
    gate_up = Linear(64, 32, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(5, 64, device="cuda").bfloat16()
    reader = Linear(16, 64, device="cuda", dtype=torch.bfloat16)
    _, normed = add_norm(x, x, norm, gate_up)
    assert isinstance(normed, Tensor)
    assert type(normed.grad_fn).__name__ == "AddNormBackward"
    gated = gate(normed, gate_up, "silu", reader)
    assert isinstance(gated, Tensor)
    assert type(gated.grad_fn).__name__ == "SiluTimesBackward"
