"""Matmuls in int8 beside float64 and the plain model."""

import sys
from types import ModuleType
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from plain_steps import (
    EPILOGUES,
    add_norm,
    made_of,
    norms,
    rounding,
    rows_stand_for,
    stands_for,
    tiles_stand_for,
)
from torch import Tensor, nn

import packvit
from packvit.bench.accuracy import fp8_accuracy, pictures, plant
from packvit.bench.models import random_model
from packvit.config import Activation, TransformerConfig
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.fast.int8 import (
    LinearInt8,
    QuantizedRows,
    QuantizedTiles,
    TiledLinearInt8,
    quantize,
    quantize_tiles,
    read_norm,
)
from packvit.fast.steps import Delta, mlp_hidden, project
from packvit.model.layers import MLP, Block, GatedMLP, LayerScale, first_linear
from packvit.model.linear import Linear
from packvit.model.norms import RMSNorm

GRID = ((1, 6, 9), (1, 8, 4), (1, 5, 5))


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Within half a step of the row's scale, and fp32's rounding."""
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((found - exact).abs() <= 0.501 * step).all()


def test_rows_and_tiles_are_rounded_to_127ths_of_their_largest():
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).double()
    assert_rounded_once(stands_for(*quantize(x)), x)
    x[:, 130] *= 100  # of the second tile
    tiles = quantize_tiles(x)
    assert tiles.scales.shape == (3, 50)
    off = (tiles_stand_for(tiles) - x).abs()
    for first, last in ((0, 128), (128, 256), (256, 300)):
        step = x[:, first:last].abs().amax(1, keepdim=True) / 127
        assert (off[:, first:last] <= 0.501 * step).all()


def test_numbers_that_are_not_finite_reach_the_scale_of_their_row_alone():
    x = torch.ones(4, 256)
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    assert quantize(x)[1].isnan()[:, 0].tolist() == [False, True, True, False]
    assert quantize_tiles(x).scales.isnan().tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("undone", [True, False])
def test_a_channel_that_stands_out_in_a_norm_costs_other_channels_little(undone: bool):
    """A hundred channels do, more than are apart: by one scale a row the others would drown."""
    draw = torch.Generator().manual_seed(0)
    errors = {}
    for outlier in (1, 100):
        norm, linear = RMSNorm(192, 1e-6), Linear(192, 320, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(320, 192, generator=draw) / 192**0.5)
            norm.weight[:100] *= outlier
            if undone:
                linear.weight[:, :100] /= outlier
            x = norm(torch.randn(300, 192, generator=draw))
            exact = F.linear(x, linear.weight)
            errors[outlier] = (LinearInt8(linear, norm)(x) - exact).norm() / exact.norm()
            plain = stands_for(*quantize(x)) @ stands_for(*quantize(linear.weight)).T
    assert errors[100] < 1.3 * errors[1] < 0.02
    assert not undone or (plain - exact).norm() > 10 * errors[100] * exact.norm()


@pytest.mark.usefixtures("kernels")
def test_a_few_channels_are_as_exact_as_bfloat16():
    """Those that matter most in what is made of them."""
    draw = torch.Generator().manual_seed(0)
    norm, linear = RMSNorm(192, 1e-6), Linear(192, 320, bias=False)
    with torch.no_grad():
        norm.weight[7:19] *= 1000
        x = norm(torch.randn(300, 192, generator=draw))
        exact = F.linear(x, linear.weight)
        found = LinearInt8(linear, norm)(x).float()
    assert (found - exact).norm() < 3e-3 * exact.norm()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def mlp_of(first: nn.Module, second: nn.Module, gated: bool) -> Any:
    config = sizes(192, gated=gated)
    mlp: Any = GatedMLP(config) if gated else MLP(config)
    setattr(mlp, "gate_up" if gated else "up", first)
    mlp.down = second
    return mlp


def drawn_mlp(gated: bool, bias: bool, device: str) -> tuple[Linear, Linear, Tensor]:
    """Return an MLP's two matrices, and tokens for them."""
    draw = torch.Generator().manual_seed(0)
    first, second = Linear(192, 320 * (1 + gated), bias=bias), Linear(320, 192, bias=bias)
    x = torch.randn(300, 192, generator=draw)
    with torch.no_grad():
        for linear in (first, second):
            shape = linear.weight.shape
            linear.weight.copy_(torch.randn(shape, generator=draw) / shape[1] ** 0.5)
        first.weight[3], x[7] = 0, 0
    return first.to(device), second.to(device), x.to(device, torch.bfloat16)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference implementations in the place of kernels, which need a GPU."""
    matmuls: Any = ModuleType("packvit.fast.kernels.matmuls")
    int8: Any = ModuleType("packvit.fast.kernels.int8")
    gates: Any = ModuleType("packvit.fast.kernels.gates")

    def affine(values, scale, apart, weight, weight_scale, apart_weight, bias) -> Tensor:
        more = apart.float() @ apart_weight.float().T
        made = F.linear(values * scale, weight * weight_scale[:, None], bias)
        return made + more

    def add(stream, values, scales, weight, weight_scale, bias, factor) -> Tensor:
        tokens = tiles_stand_for(QuantizedTiles(values, scales)).float()
        made = F.linear(tokens, weight * weight_scale[:, None], bias)
        return stream.add_(made if factor is None else made * factor)

    matmuls.linear_int8 = lambda *given: affine(*given).bfloat16()
    matmuls.linear_act_int8 = lambda *given: quantize_tiles(made_of(affine(*given[:7]), *given[7:]))
    int8.add_tiles_ = add
    gates.silu_mul = lambda gate_up: made_of(gate_up, "silu", True)
    for module in (matmuls, int8, gates):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("wrapped", ["none", "first", "second", "both"])
def test_mlps_in_int8_may_be_wrapped(gated: bool, wrapped: str):
    first, second, x = drawn_mlp(gated, True, "cpu")
    exact = second(made_of(first(x.float()), "silu", gated))
    up, down = LinearInt8(first, RMSNorm(192, 1e-6)), TiledLinearInt8(second)
    reads: nn.Module = Wrapped(up) if wrapped in ("first", "both") else up
    last: nn.Module = Wrapped(down) if wrapped in ("second", "both") else down
    mlp = mlp_of(reads, last, gated)
    with torch.no_grad():
        hidden = mlp_hidden(x, mlp, False)
        assert isinstance(hidden, QuantizedTiles) == (wrapped == "none")
        stream, delta = project(torch.zeros_like(x), hidden, last, nn.Identity(), False)
        found = stream if delta is None else delta.tokens
        called = mlp(x)
    assert (called.float() - exact).norm() <= 0.03 * exact.norm()
    assert (found.float() - exact).norm() <= 0.03 * exact.norm()


@torch.no_grad()
def in_int8(encoder: Encoder) -> None:
    """Put an encoder's matrices in int8 where no GPU is, by the kernels' references."""
    for block in encoder.encoder.layers:
        assert isinstance(block, Block)
        block.attention.qkv = Cast(read_norm(block.attention.qkv, block.attention_norm))
        first = read_norm(first_linear(block.mlp), block.mlp_norm)
        setattr(block.mlp, "gate_up" if isinstance(block.mlp, GatedMLP) else "up", Cast(first))
        assert isinstance(block.mlp.down, Linear)
        block.mlp.down = Cast(TiledLinearInt8(block.mlp.down))


class Cast(Wrapped):
    """To the dtype of the encoder, which is float32 here."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).to(x.dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("outliers", [None, "undone"])
def test_tiny_in_int8_keeps_its_tokens(outliers: str | None):
    encoder = packvit.load("tiny", device="cpu", dtype=torch.float32)
    if outliers:
        plant(encoder, undo=True)
    pack = torch.from_numpy(pictures(GRID, encoder.config.patch)), torch.tensor(GRID)
    with torch.inference_mode():
        exact = encoder(*pack)
        in_int8(encoder)
        near = F.cosine_similarity(encoder(*pack), exact)
    assert near.mean() >= 0.9998
    assert near.quantile(0.01) >= 0.9995


def test_matrices_in_int8_are_moved_and_never_cast():
    first, second, _ = drawn_mlp(True, True, "cpu")
    matrices = nn.ModuleList([LinearInt8(first, RMSNorm(192, 1e-6)), TiledLinearInt8(second)])
    before = {name: x.clone() for name, x in matrices.state_dict().items()}
    after = matrices.bfloat16().half().state_dict()
    for name, x in before.items():
        assert after[name].dtype == x.dtype
        assert torch.equal(after[name], x)
    moved = matrices.to("meta", torch.float64).state_dict()
    assert {name: (x.device.type, x.dtype) for name, x in moved.items()} == {
        name: ("meta", x.dtype) for name, x in before.items()
    }


@pytest.mark.usefixtures("kernels")
def test_an_encoder_in_int8_may_be_moved_and_is_not_cast():
    encoder = packvit.load("tiny", device="cpu", dtype=torch.bfloat16)
    in_int8(encoder)
    encoder.fp8 = True
    pack = torch.from_numpy(pictures(GRID, encoder.config.patch)), torch.tensor(GRID)
    with torch.inference_mode():
        before = encoder(*pack)
        with pytest.raises(ValueError, match="was to be cast to torch"):
            encoder.float()
        assert torch.equal(encoder.to("cpu", torch.bfloat16)(*pack), before)


def test_fp8_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="fp8 needs a CUDA device and the encoder is on cpu"):
        FAMILIES[0].from_transformers(reference.build("aimv2"), fp8=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (77, 2816), (33, 1040), (500, 4304)])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_norms_round_to_int8_once(tokens: int, width: int, outlier: float):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    for norm in norms(width, "cuda", torch.bfloat16):
        with torch.inference_mode():
            norm.weight[3] *= outlier
            reader = LinearInt8(nn.Linear(width, 16, device="cuda"), norm)
            summed, found = add_norm(x, Delta(x, None), norm, reader, False)
            exact = norm.double()(summed.double()) / reader.channels
        apart = exact[:, reader.apart]
        assert ((found.apart - apart).abs() <= 2**-8 * apart.abs() + 1e-6).all()
        exact = exact.index_fill(1, reader.apart, 0)
        assert_rounded_once(stands_for(found.values, found.scale), exact)


def exactly(rows: QuantizedRows, linear: LinearInt8) -> Tensor:
    """Return what a matrix makes of tokens in int8, in float64."""
    bias = None if linear.bias is None else linear.bias.double()
    weight = stands_for(linear.weight, linear.scale[:, None])
    weight = weight.index_copy(1, linear.apart, linear.apart_weight.double())
    return F.linear(rows_stand_for(rows, linear), weight, bias)


def plain_norm(width: int, outlier: float = 1.0) -> RMSNorm:
    norm = RMSNorm(width, 1e-6).to("cuda", torch.bfloat16)
    with torch.no_grad():
        norm.weight[3] *= outlier  # which goes apart then
    return norm


outliers = pytest.mark.parametrize("outlier", [1.0, 100.0])


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [16, 2816])
@outliers
def test_a_matmul_in_int8_is_that_of_its_rounded_operands(
    bias: bool, features: int, outlier: float
):
    torch.manual_seed(0)
    linear = Linear(1040, features, bias=bias, device="cuda", dtype=torch.bfloat16)
    eight = LinearInt8(linear, plain_norm(1040, outlier))
    assert len(eight.apart) == (16 if outlier > 1 else 0)
    rows = eight.rows(torch.randn(333, 1040, device="cuda"))
    with torch.inference_mode():
        assert rounding(eight(rows), exactly(rows, eight)) <= 1.01  # sums are exact


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", EPILOGUES)
@outliers
def test_an_activation_is_rounded_to_int8_in_the_matmul(
    gated: bool, bias: bool, activation: Activation, outlier: float
):
    first, _, x = drawn_mlp(gated, bias, "cuda")
    eight = LinearInt8(first.bfloat16(), plain_norm(192, outlier))
    rows = eight.rows(x)
    exact = made_of(exactly(rows, eight), activation, gated)
    with torch.inference_mode():
        found = eight.act(rows, activation, gated)
    expected = quantize_tiles(exact)
    torch.testing.assert_close(found.scales, expected.scales.float(), rtol=1e-3, atol=1e-12)
    off, least = ((tiles_stand_for(rounded) - exact).norm().item() for rounded in (found, expected))
    assert off <= 1.01 * least


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 77, 4096])
def test_the_second_matmul_adds_to_the_stream_and_rounds_once(bias: bool, tokens: int):
    torch.manual_seed(tokens)
    linear = Linear(2832, 1040, bias=bias, device="cuda", dtype=torch.bfloat16)
    eight = TiledLinearInt8(linear)
    stream = torch.randn(tokens, 1040, device="cuda").bfloat16()
    hidden = quantize_tiles(torch.randn(tokens, 2832, device="cuda"))
    bias_of = linear.bias.double() if bias else None
    weight = stands_for(eight.weight, eight.scale[:, None])
    made = F.linear(tiles_stand_for(hidden), weight, bias_of)
    scale: Any = LayerScale(sizes(1040)).to("cuda", torch.bfloat16)
    nn.init.normal_(scale.scale)
    with torch.inference_mode():
        for after, factor in ((nn.Identity(), 1.0), (scale, scale.scale.double())):
            exact = stream.double() + made * factor
            found, rest = project(stream.clone(), hidden, eight, after, False)
            assert rest is None
            assert rounding(found, exact) <= 1.01
        assert rounding(eight(hidden), made) <= 1.01


def sizes(width: int, *, gated: bool = True) -> TransformerConfig:
    return TransformerConfig(
        width=width,
        layers=1,
        heads=4,
        mlp_width=320,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        gated=gated,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_a_row_in_int8_does_not_know_of_other_rows(gated: bool):
    torch.manual_seed(0)
    first = Linear(1024, 2816 * (1 + gated), bias=False, device="cuda", dtype=torch.bfloat16)
    second = Linear(2816, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    up, down = LinearInt8(first, plain_norm(1024)), TiledLinearInt8(second)
    x = torch.randn(9000, 1024, device="cuda").bfloat16()

    def run(tokens: Tensor) -> Tensor:
        rows = up.rows(tokens)
        return torch.cat([down(up.act(rows, "silu", gated)), up(rows)], 1)

    with torch.inference_mode():
        whole = run(x)
        assert torch.equal(whole, run(x))
        for start, count in [(0, 1), (17, 1), (500, 129), (8000, 1000)]:
            assert torch.equal(run(x[start : start + count]), whole[start : start + count])
        x[3, 5], x[4, 6] = torch.nan, torch.inf
        after = run(x)
    assert torch.equal(after[5:], whole[5:])
    assert torch.equal(after[:3], whole[:3])
    assert after[3:5].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["aimv2-large", "siglip2-so400m"])
def test_fp8_keeps_tokens_within_the_promised_cosines(name: str):
    """At least 0.999 on average and 0.995 at p1; with outliers at most 0.01 below bf16."""
    device = torch.device("cuda")
    model = random_model(name, 12, device, torch.bfloat16)
    for of in fp8_accuracy(model, device):
        print(of)
        kept = "x 100" in of["weights"] and "undone" not in of["weights"]
        assert of["fp8"]["mean"] >= (of["bf16"]["mean"] - 0.01 if kept else 0.999)
        assert kept or of["fp8"]["p1"] >= 0.995
