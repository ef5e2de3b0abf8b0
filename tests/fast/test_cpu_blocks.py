"""On a CPU oneDNN's matmuls give what the rule allows, and step past nothing that watches."""

import copy
from typing import Any

import peft
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.fast import cpu
from packvit.fast.hooks import is_hooked
from packvit.model.activations import ACTIVATIONS
from packvit.model.linear import KeylessBiasLinear, Linear
from packvit.training.blocks import block_linears
from packvit.verification.rule import judge

GRID = [(1, 3, 4), (2, 2, 5), (1, 1, 7), (1, 9, 11)]
OPERATOR = "mkldnn::_linear_pointwise"

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != cpu.CAPABILITY or cpu.onednn_linear() is None,
    reason="oneDNN's matmuls are taken with AVX-512 alone",
)


def encoder_of(kind: str, **options: Any) -> tuple[Encoder, Tensor, Tensor]:
    model = reference.build(kind)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    encoder = family.from_transformers(model, positions="interpolate", **options)
    return encoder, reference.draw_patches(GRID, encoder.config.patch_dim), torch.tensor(GRID)


def matmuls(encoder: Encoder, patches: Tensor, grid: Tensor) -> int:
    """Return how many matmuls of a forward are oneDNN's, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        encoder(patches, grid)
    return sum(event.name == OPERATOR for event in seen.events() or ())


def parts(encoder: Encoder) -> int:
    """Return into how many parts the sums of a forward are split."""
    widths = [encoder.get_parameter(f"{name}.weight").shape[1] for name in block_linears(encoder)]
    assert len(widths) == 4 * encoder.config.layers
    return sum(-(-width // cpu.RUN) for width in widths)


OUTPUTS = ("tokens", "prefix", "pooled", "projected")


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_every_family_is_as_near_to_float64_as_the_rule_allows(kind: str, invariant: bool):
    encoder, patches, grid = encoder_of(kind, invariant=invariant)
    layers, projected = range(encoder.config.layers), encoder.projection is not None
    given = patches.clone()
    with torch.inference_mode():
        assert invariant or matmuls(encoder, patches, grid) == parts(encoder)
        found = encoder.encode(patches, grid, taps=layers, projected=projected)
        assert torch.equal(given, patches)
        encoder.fast = None
        plain = encoder.encode(patches, grid, taps=layers, projected=projected)
        exact = encoder.double().encode(patches.double(), grid, taps=layers, projected=projected)
    sets = [([getattr(x, name) for x in (found, plain, exact)], len(layers)) for name in OUTPUTS]
    sets += [([x.taps[layer] for x in (found, plain, exact)], layer + 1) for layer in layers]
    for outputs, blocks in sets:
        if outputs[0] is not None:
            given_sets = ([x] for x in outputs)
            assert all(j.passed for j in judge(*given_sets, dtype=torch.float32, blocks=blocks))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 33, 257, 1025])
@pytest.mark.parametrize("keyless", [False, True])
def test_a_matmul_is_that_of_the_formula(name: Any, tokens: int, keyless: bool):
    torch.manual_seed(tokens)
    layer = KeylessBiasLinear(37) if keyless else Linear(37, 53)
    nn.init.normal_(layer.qv_bias if isinstance(layer, KeylessBiasLinear) else layer.bias)
    x = torch.randn(2 * tokens, 37)[::2]  # not contiguous
    with torch.inference_mode():
        for invariant in (False, True):
            layer.invariant = invariant
            found = cpu.linear(x, layer, ACTIVATIONS[name])
            exact = ACTIVATIONS[name](copy.deepcopy(layer).double()(x.double()))
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [384, 768, 1536, 4304])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_sum_is_as_exact_as_torchs(depth: int, invariant: bool):
    torch.manual_seed(depth)
    layer, x = Linear(depth, 96), torch.randn(256, depth)
    layer.invariant = invariant
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.inference_mode():
        ours, theirs = (
            (y - exact).square().mean().sqrt() for y in (cpu.linear(x, layer), layer(x))
        )
    assert ours < 1.1 * theirs


def test_whatever_watches_a_module_is_called():
    encoder, patches, grid = encoder_of("siglip2")
    block = encoder.encoder.layers[1]
    for name, module in block.named_modules():
        called: list[str] = []
        watch = module.register_forward_hook(lambda *given, to=called: to.append("hook"))
        with torch.inference_mode(), watch:
            encoder(patches, grid)
        assert called == ["hook"], name
    seen: list[nn.Module] = []
    watch = nn.modules.module.register_module_forward_hook(
        lambda module, *given: seen.append(module)
    )
    with torch.inference_mode(), watch:
        assert is_hooked(block)
        encoder(patches, grid)
    assert set(block.modules()) <= set(seen)


def test_a_forward_of_ones_own_and_a_matrix_of_ones_own_are_called():
    encoder, patches, grid = encoder_of("clip")
    with torch.inference_mode():
        before = encoder(patches, grid)
        up = encoder.encoder.get_submodule("layers.0.mlp.up")
        assert isinstance(up, Linear)
        up.forward = lambda input: 2 * Linear.forward(up, input)  # as accelerate puts it there
        assert not torch.allclose(encoder(patches, grid), before)
        del vars(up)["forward"]
        assert torch.equal(encoder(patches, grid), before)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(up, "weight", Doubled())
    with torch.inference_mode():
        found = encoder(patches, grid)
        assert matmuls(encoder, patches, grid) == 4 * encoder.config.layers - 1
        encoder.fast = None
        torch.testing.assert_close(found, encoder(patches, grid), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before)


def test_adapters_are_called():
    encoder, patches, grid = encoder_of("aimv2")
    with torch.inference_mode():
        before = encoder(patches, grid)
    adapted = [name for name in block_linears(encoder) if "mlp" in name]
    config = peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
    peft.get_peft_model(encoder, config)
    with torch.inference_mode():
        assert matmuls(encoder, patches, grid) == 2 * encoder.config.layers
        found = encoder(patches, grid)
        encoder.fast = None
        torch.testing.assert_close(found, encoder(patches, grid), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before)


def test_a_weight_that_is_not_contiguous_is_left_to_torch():
    encoder, patches, grid = encoder_of("siglip")
    out = encoder.encoder.get_submodule("layers.0.attention.out")
    assert isinstance(out, Linear)
    out.weight = nn.Parameter(out.weight.detach().t().contiguous().t())
    with torch.inference_mode():
        assert matmuls(encoder, patches, grid) == 4 * encoder.config.layers - 1


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of `flags`, whatever one asks for
@pytest.mark.parametrize(
    "within",
    [
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad,
        torch.autograd.forward_ad.dual_level,
        lambda: FlopCounterMode(display=False),
    ],
    ids=["oneDNN is off", "autocast", "gradients", "tangents", "a count of operations"],
)
def test_the_plain_blocks_run(within: Any):
    encoder, patches, grid = encoder_of("dinov3")
    with torch.no_grad():
        assert matmuls(encoder, patches, grid)
        with within():
            assert not cpu.can_multiply(encoder.encoder, patches)
            found = encoder(patches, grid)
            encoder.fast = None
            assert torch.equal(found, encoder(patches, grid))


def test_a_torch_without_the_operator_runs_the_plain_blocks(monkeypatch: pytest.MonkeyPatch):
    encoder, patches, grid = encoder_of("dinov3")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with torch.inference_mode():
        found = encoder(patches, grid)
        encoder.fast = None
        assert torch.equal(found, encoder(patches, grid))


def test_gradients_of_torch_func_are_those_of_autograd():
    encoder, patches, grid = encoder_of("siglip")
    encoder.requires_grad_(False)

    def total(x: Tensor) -> Tensor:
        return encoder(x, grid).square().mean()

    found = torch.func.grad(total)(patches)
    [expected] = torch.autograd.grad(total(patches.requires_grad_()), patches)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


def test_frozen_weights_run_it_with_gradients_switched_on_and_copies_do():
    encoder, patches, grid = encoder_of("aimv2")
    encoder.requires_grad_(False)
    assert matmuls(copy.deepcopy(encoder), patches, grid) == 4 * encoder.config.layers
    assert not matmuls(encoder, patches.requires_grad_(), grid)
