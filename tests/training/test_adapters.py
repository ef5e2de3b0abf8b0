"""Adapters on any matrix, and DDP where a part of the encoder has no say in the loss: W10."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from packvit.encoder import Encoder
from packvit.families.clip import ClipPacking
from packvit.families.siglip import SiglipPacking

GRID = [(1, 2, 2), (1, 2, 2), (1, 2, 2)]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make(kind: str) -> Encoder:
    torch.manual_seed(0)
    if kind == "clip":
        return ClipPacking.from_transformers(CLIPVisionModel(CLIPVisionConfig(**SMALL)))
    return SiglipPacking.from_transformers(SiglipVisionModel(SiglipVisionConfig(**SMALL)))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_lora_on_every_qkv_encodes_and_learns_the_pooling_heads_too(kind: str):
    """W10."""
    encoder, patches = make(kind), reference.draw_patches(GRID, 588)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(copy.deepcopy(encoder), config)
    found = adapted.encode(patches, GRID)
    (found.tokens.square().mean() + found.pooled.square().mean()).backward()
    learnt = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * (3 if kind == "siglip" else 2)  # the head has one too
    assert all(grad is not None and grad.abs().max() > 0 for grad in learnt.values())
    merged = adapted.merge_and_unload().encode(patches, GRID)
    plain = encoder.encode(patches, GRID)
    assert reference.scaled_difference(found.tokens, merged.tokens) <= 1e-5
    assert reference.scaled_difference(found.pooled, merged.pooled) <= 1e-5
    assert reference.scaled_difference(found.pooled, plain.pooled) > 0.01


def train_beside(rank: int, folder: str, kind: str, find_unused: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(make(kind), find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        model(reference.draw_patches(GRID, 588, seed=2 * step + rank), GRID).sum().backward()
        optimizer.step()
    state = {name: x.detach().clone() for name, x in model.module.named_parameters()}
    torch.save(state, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def train_two(folder: Path, kind: str, find_unused: bool) -> None:
    arguments = (str(folder), kind, find_unused)
    torch.multiprocessing.spawn(train_beside, arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage] # its only name


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_ddp_trains_on_tokens_alone_when_told_that_parts_may_be_unused(tmp_path: Path, kind: str):
    """W10. CLIP's last norm and SigLIP's head make no tokens."""
    train_two(tmp_path, kind, find_unused=True)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    before = dict(make(kind).named_parameters())
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    unused = {name for name in one if name.split(".")[0] == ("norm" if kind == "clip" else "head")}
    assert unused
    assert moved == one.keys() - unused


@pytest.mark.soak
def test_ddp_that_is_not_told_stops_at_the_second_step(tmp_path: Path):
    """Why docs/training.md says so: if torch no longer needs it, neither do the docs."""
    with pytest.raises(ProcessRaisedException, match="find_unused_param"):
        train_two(tmp_path, "siglip", find_unused=False)
