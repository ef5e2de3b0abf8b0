import copy

import pytest
import reference
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from packvit.families.siglip import SiglipPacking
from packvit.training.tower import Tower

GRID = [(1, 2, 2), (1, 2, 2), (1, 2, 2)]


def small_encoder() -> SiglipPacking:
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    return SiglipPacking.from_transformers(SiglipVisionModel(config))


def test_a_tower_calls_what_fsdp_gathers_weights_for(monkeypatch: pytest.MonkeyPatch):
    """`shard` registers `encode`: what goes past it meets weights that are not there."""
    tower = Tower(small_encoder(), 32, taps=[0])
    patches = reference.draw_patches(GRID, 588)
    expected = tower(patches, GRID).tokens
    encode, calls = tower.encoder.encode, []

    def gathered(*arguments, **options):
        calls.append(options)
        return encode(*arguments, **options)

    monkeypatch.setattr(tower.encoder, "encode", gathered)  # as register_fsdp_forward_method does
    assert torch.equal(tower(patches, GRID).tokens, expected)
    assert len(calls) == 1


def test_a_tower_leaves_the_pooling_head_alone():
    tower = Tower(small_encoder(), 32)
    assert isinstance(tower.encoder.head, nn.Module)
    tower(reference.draw_patches(GRID, 588), GRID).tokens.sum().backward()
    assert all(parameter.grad is None for parameter in tower.encoder.head.parameters())
    assert tower.encoder.embeddings.patches.weight.grad is not None


@pytest.mark.gpu
def test_a_tower_runs_on_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first = Tower(small_encoder(), 32, taps=[0]).to("cuda:0", torch.bfloat16)
    second = copy.deepcopy(first).to("cuda:1")
    patches = reference.draw_patches(GRID, 588)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.cuda.device(0):
            there = second(patches.to("cuda:1"), GRID).tokens
            assert torch.cuda.current_device() == 0
            here = first(patches.to("cuda:0"), GRID).tokens
        assert there.device == torch.device("cuda:1")
        assert torch.equal(there.cpu(), here.cpu())
