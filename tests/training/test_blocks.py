"""Freezing, checkpointed activations, compiled blocks, autocast and adapters, of every family."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
from torch import Tensor

import packvit
from packvit.encoder import Encoder
from packvit.training.blocks import (
    block_linears,
    checkpoint_activations,
    freeze,
)

OWN = [(1, 5, 5), (2, 5, 5)]
GRID = torch.tensor(OWN)


def load(tmp_path: Path, kind: str, **changes: Any) -> Encoder:
    reference.build(kind, **changes).save_pretrained(tmp_path / kind)
    return packvit.load(tmp_path / kind, dtype=torch.float32)


def step(encoder: Encoder, grid: Tensor = GRID) -> Tensor:
    patches = reference.draw_patches(grid.tolist(), encoder.config.patch_dim)
    loss = encoder(patches, grid).square().mean()
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that a forward keeps for its backward, weights aside."""

    def __init__(self, encoder: Encoder) -> None:
        self.numbers = 0
        weights = {p.data_ptr() for p in encoder.parameters()}

        def keep(x: Tensor) -> Tensor:
            self.numbers += 0 if x.untyped_storage().data_ptr() in weights else x.numel()
            return x

        super().__init__(keep, lambda x: x)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_checkpointed_activations_give_the_same_gradients(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind)
    lean = copy.deepcopy(encoder)
    checkpoint_activations(lean)
    assert list(lean.state_dict()) == list(encoder.state_dict())
    assert [name for name, _ in lean.named_modules()] == [n for n, _ in encoder.named_modules()]
    assert torch.equal(step(lean), step(encoder))
    for ours, theirs in zip(lean.parameters(), encoder.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            assert ours.grad is not None
            assert torch.equal(ours.grad, theirs.grad)


def test_checkpointed_blocks_keep_their_inputs_alone(tmp_path: Path):
    encoder = load(tmp_path, "aimv2")
    with (plain := Kept(encoder)):
        step(encoder)
    checkpoint_activations(encoder)
    again = copy.deepcopy(encoder)  # which runs its own blocks, not the original's
    with (lean := Kept(again)):
        step(again)
    assert encoder.get_parameter("encoder.layers.0.mlp.down.weight").grad is not None
    assert lean.numbers < plain.numbers / 3


@pytest.mark.parametrize("kind", reference.KINDS)
def test_a_frozen_tower_keeps_no_graph(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind)
    freeze(encoder)
    patches = reference.draw_patches(OWN, encoder.config.patch_dim)
    with (kept := Kept(encoder)):
        found = encoder.encode(patches, GRID, taps=[0])
    outputs = [found.tokens, found.taps[0], found.prefix, found.pooled]
    assert all(out.grad_fn is None for out in outputs if out is not None)
    assert kept.numbers == 0


def test_blocks_frozen_from_the_front_keep_no_graph(tmp_path: Path):
    encoder = load(tmp_path, "siglip2")
    with (whole := Kept(encoder)):
        step(encoder)
    encoder.zero_grad()
    freeze(encoder, blocks=2)
    patches = reference.draw_patches(OWN, encoder.config.patch_dim)
    with (kept := Kept(encoder)):
        found = encoder.encode(patches, GRID, taps=[1])
    assert found.taps[1].grad_fn is None
    assert 0 < kept.numbers < whole.numbers / 2
    found.tokens.sum().backward()
    assert all(p.grad is None for p in encoder.encoder.layers[1].parameters())
    assert all(p.grad is not None for p in encoder.encoder.layers[2].parameters())
    with pytest.raises(ValueError, match="blocks is 4, but this encoder has 3"):
        freeze(encoder, blocks=4)


def compiled(tmp_path: Path, kind: str, **options: Any) -> None:
    # In a process of its own: the types checked in this one cannot be compiled.
    load(tmp_path, kind, **({"is_native": True} if kind == "aimv2" else {}))
    script = Path(__file__).with_name("compiled.py")
    job = {"folder": str(tmp_path / kind), "device": "cpu", "compiler": "aot_eager"} | options
    command = [sys.executable, str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["graphs"][0] > 0
    assert found["graphs"] == [found["graphs"][0]] * 20
    assert max(found["differences"]) <= found["limit"]


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "lean"), [("aimv2", False), ("siglip2", True)])
def test_a_training_step_is_compiled_once_for_all_packs(tmp_path: Path, kind: str, lean: bool):
    compiled(tmp_path, kind, lean=lean)


@pytest.mark.gpu
@pytest.mark.parametrize("lean", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["aimv2", "siglip2"])
def test_whole_blocks_are_compiled_once_on_the_gpu(tmp_path: Path, kind: str, lean: bool):
    compiled(tmp_path, kind, lean=lean, device="cuda", compiler="inductor")


@pytest.mark.parametrize("kind", reference.KINDS)
def test_bf16_autocast_trains_fp32_weights(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind).train()
    patches = reference.draw_patches(OWN, encoder.config.patch_dim)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    target = torch.randn(75, encoder.config.width, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encoder(patches, GRID)
            loss = (tokens.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in encoder.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.KINDS)
def test_autocast_on_cuda_attends_by_varlen_in_bf16(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind).to("cuda").train()
    patches = reference.draw_patches(OWN, encoder.config.patch_dim).cuda()
    exact = encoder(patches, GRID).detach()
    with torch.autocast("cuda", torch.bfloat16):
        assert encoder.attention in ("fa4", "torch")  # the first where it is installed
        tokens = encoder(patches, GRID)
    assert 0 < (tokens - exact).norm() < 0.05 * exact.norm()
    tokens.float().square().mean().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", ["aimv2", "siglip2", "dinov3", "dinov2, swiglu", "clip"])
def test_lora_learns_in_every_block_and_merges_into_a_checkpoint(tmp_path: Path, kind: str):
    encoder = load(tmp_path, kind)
    before = encoder(reference.draw_patches(OWN, encoder.config.patch_dim), GRID).detach()
    config = peft.LoraConfig(r=2, target_modules=block_linears(encoder), init_lora_weights=False)
    adapted: Any = peft.get_peft_model(copy.deepcopy(encoder), config)
    patches = reference.draw_patches(OWN, encoder.config.patch_dim)
    tokens = adapted(patches, GRID)
    tokens.square().mean().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * len(block_linears(encoder))
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    assert (tokens - before).abs().max() > 0.01

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(encoder), str(tmp_path / "adapter"))
    assert torch.equal(again(patches, GRID), tokens)
    merged: Any = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = packvit.load(tmp_path / "merged")(patches, GRID)
    # Another order of sums, under adapters drawn at a scale where they change every token.
    assert reference.scaled_difference(found, tokens) <= 1e-4
