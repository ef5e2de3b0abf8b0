"""The fast path gives what the plain blocks give, and calls whatever watches or wraps a module."""

from typing import Any

import peft
import pytest
import reference
import torch
from torch import Tensor, nn

from packvit.encoder import Encoder
from packvit.families import FAMILIES, AIMv2Packing
from packvit.fast.blocks import can_run, run_blocks
from packvit.fast.hooks import is_hooked
from packvit.training.blocks import block_linears, checkpoint_activations

GRID = [(1, 3, 4), (2, 2, 5), (1, 1, 7)]


def on_gpu(
    kind: str, *, changes: dict[str, Any] | None = None, **options: Any
) -> tuple[Encoder, Tensor, Tensor]:
    model = reference.build(kind, **(changes or {})).to("cuda", torch.bfloat16)
    [family] = [f for f in FAMILIES if model.config.model_type in f.family.model_types]
    encoder = family.from_transformers(model, positions="interpolate", attention="torch", **options)
    assert encoder.fast is not None
    encoder.fast.graphs = None
    patches = reference.draw_patches(GRID, encoder.config.patch_dim).cuda()
    return encoder, patches, torch.tensor(GRID)


def assert_near(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fewer roundings are no further from fp32 than the plain model's, but for luck."""
    error, other = ((x.float() - exact.float()).norm() for x in (found, plain))
    assert error <= 1.2 * other + 1e-3 * exact.float().norm()


def test_training_and_16_bits_run_the_plain_model_on_a_cpu():
    encoder = AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True))
    assert not can_run(encoder.encoder, torch.zeros(3, encoder.config.width))
    assert not can_run(encoder.encoder, torch.zeros(3, encoder.config.width).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in reference.KINDS),
        ("aimv2", {"intermediate_size": 60}),  # no multiple of 8
        ("clip", {"intermediate_size": 60}),
    ],
)
@pytest.mark.parametrize("invariant", [False, True])
def test_fused_blocks_are_as_near_to_fp32_as_plain_ones(
    kind: str, changes: dict[str, Any], invariant: bool
):
    encoder, patches, grid = on_gpu(kind, changes=changes, invariant=invariant)
    layers = range(encoder.config.layers)
    with torch.inference_mode():
        assert can_run(encoder.encoder, encoder(patches, grid))
        given = patches.clone()
        found = encoder.encode(patches, grid, taps=layers)
        assert torch.equal(given, patches)
        encoder.fast = None
        plain = encoder.encode(patches, grid, taps=layers)
        encoder.backend = "auto"  # varlen kernels take 16 bits alone
        exact = encoder.float().encode(patches.float(), grid, taps=layers)
    assert_near(found.tokens, plain.tokens, exact.tokens)
    for layer in layers:
        assert_near(found.taps[layer], plain.taps[layer], exact.taps[layer])


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["torch", "fa4"])
@pytest.mark.parametrize("kind", ["aimv2", "dinov3", "clip"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_of_one_size_do_not_know_each_other(kind: str, attention: str, bad: float):
    """As in packs of any sizes; FlashAttention-4 takes them as a batch."""
    if attention == "fa4":
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    encoder, _, _ = on_gpu(kind)
    encoder.backend = attention
    grid = [(1, 5, 5)] * 6
    patches = reference.draw_patches(grid, encoder.config.patch_dim).cuda()
    with torch.inference_mode():
        before = encoder.encode(patches, torch.tensor(grid))
        patches[50:75] = bad
        after = encoder.encode(patches, torch.tensor(grid))
    for place, (one, two) in enumerate(zip(before.per_image(), after.per_image(), strict=True)):
        assert torch.equal(one, two) is (place != 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_fused_gradients_are_as_near_to_fp32_as_plain_ones(kind: str, recomputed: bool):
    encoder, patches, grid = on_gpu(kind)
    if recomputed:
        checkpoint_activations(encoder)

    def gradients(patches: Tensor) -> Tensor:
        encoder.zero_grad()
        encoder(patches, grid).float().square().mean().backward()
        return torch.cat(
            [p.grad.float().flatten() for p in encoder.parameters() if p.grad is not None]
        )

    found = gradients(patches)
    encoder.fast = None
    plain = gradients(patches)
    encoder.float().backend = "auto"  # varlen kernels take 16 bits alone
    assert_near(found, plain, gradients(patches.float()))


@pytest.mark.gpu
def test_whatever_watches_a_module_is_called_with_what_it_may_keep():
    encoder, patches, grid = on_gpu("aimv2")
    names = [name for name, _ in encoder.encoder.layers[0].named_modules()]
    for name in names:
        module = encoder.encoder.layers[0].get_submodule(name)
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, given: Any, out: Any, kept: Any = kept) -> None:
            kept.append((out, out.clone()))

        watch = module.register_forward_hook(keep)
        with torch.inference_mode(), watch:
            assert is_hooked(module)
            encoder(patches, grid)
        assert len(kept) == 1, name
        assert torch.equal(*kept[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["aimv2", "siglip2", "dinov3", "clip"])
def test_adapters_run_on_the_fast_path_and_change_what_they_change(kind: str):
    encoder, patches, grid = on_gpu(kind)
    config = peft.LoraConfig(r=2, target_modules=block_linears(encoder), init_lora_weights=False)
    with torch.inference_mode():
        before = encoder(patches, grid)
    peft.get_peft_model(encoder, config)
    with torch.inference_mode():
        assert can_run(encoder.encoder, before)
        found = encoder(patches, grid)
        encoder.fast = None
        plain = encoder(patches, grid)
        encoder.backend = "auto"
        exact = encoder.float()(patches.float(), grid)
    assert (found.float() - before.float()).norm() > 0.1 * before.float().norm()
    assert_near(found, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["aimv2", "siglip2", "dinov3", "clip"])
def test_gradients_of_adapters_reach_every_block(kind: str):
    """By four draws: one gives fused gradients 0.7 to 1.4 times the plain ones' distance."""
    draws = [gradients_of_adapters(kind, seed) for seed in range(4)]
    found, plain, exact = (torch.cat(each) for each in zip(*draws, strict=True))
    assert_near(found, plain, exact)


def gradients_of_adapters(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of drawn adapters: fused, plain, and plain in fp32."""
    encoder, patches, grid = on_gpu(kind)
    torch.manual_seed(seed)
    adapted = block_linears(encoder)
    made = peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)
    model = peft.get_peft_model(encoder, made, autocast_adapter_dtype=False)

    def gradients(patches: Tensor) -> Tensor:
        model.zero_grad()
        model(patches, grid).float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(found) == 2 * len(adapted)
        assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
        return torch.cat([grad.float().flatten() for grad in found.values() if grad is not None])

    found = gradients(patches)
    encoder.fast = None
    plain = gradients(patches)
    encoder.backend = "auto"
    model.float()
    return found, plain, gradients(patches.float())


@pytest.mark.gpu
def test_blocks_leave_the_stream_they_are_given_as_it_was():
    encoder, patches, grid = on_gpu("aimv2")
    streams: list[Tensor] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        streams.extend((out, out.clone()))

    with torch.inference_mode():
        watch = encoder.embeddings.register_forward_hook(keep)
        with watch:
            encoder(patches, grid)
    assert torch.equal(*streams)


def test_a_hook_anywhere_in_a_block_is_seen():
    encoder = AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True))
    for module in encoder.encoder.modules():
        assert not is_hooked(module)
        for register in (
            nn.Module.register_forward_hook,
            nn.Module.register_forward_pre_hook,
            nn.Module.register_full_backward_hook,
        ):
            with register(module, lambda *given: None):
                assert is_hooked(module)


def test_run_blocks_takes_what_blocks_take():
    import inspect

    plain = inspect.signature(type(reference_blocks()).forward).parameters
    assert list(inspect.signature(run_blocks).parameters)[1:] == list(plain)[1:]


def reference_blocks() -> nn.Module:
    return AIMv2Packing.from_transformers(reference.build("aimv2", is_native=True)).encoder
