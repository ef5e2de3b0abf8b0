"""Put an encoder where a transformers model has its vision tower, and take it out again."""

import copy
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.towers.in_place import BatchTower, PatchTower, TowerInPlace

KINDS: dict[str, type[TowerInPlace]] = {
    "Qwen3VLVisionModel": PatchTower,
    "Qwen3VLMoeVisionModel": PatchTower,
    "Qwen3_5VisionModel": PatchTower,
    "Qwen3_5MoeVisionModel": PatchTower,
    "Qwen4ExpVisionModel": PatchTower,
    "Qwen2_5_VisionTransformerPretrainedModel": PatchTower,
    "Qwen2VisionTransformerPretrainedModel": PatchTower,
    "CLIPVisionModel": BatchTower,
    "SiglipVisionModel": BatchTower,
}


class Slot(NamedTuple):
    """Where a model holds a module."""

    parent: nn.Module
    name: str
    module: nn.Module


def replace_tower(model: nn.Module) -> Encoder:
    """Replace the vision tower of a transformers model by ours, in place; return the encoder.

    The model is called as before: `generate`, its processor and training stay as they are, and the
    encoder's parameters are the model's, under other names. Runs Qwen3-VL and its successors,
    Qwen2.5-VL, Qwen2-VL, and models that ask a CLIP or SigLIP tower for the tokens of some layers
    or the last one, as LLaVA, LLaVA-NeXT, LLaVA-OneVision, VipLLaVA, Aya Vision, PaliGemma and
    Gemma 3 do. The tokens that the language model reads are the reference's, to rounding. What was
    frozen stays frozen.

    Raises: ValueError where there is no such tower, or more than one, or where one weight of ours
    would be frozen in part; CheckpointError.
    """
    held = slots(model)
    if any(isinstance(slot.module, TowerInPlace) for slot in held):
        raise ValueError("The model's vision tower is one of packvit's already.")
    found = [(slot, family) for slot in held if (family := family_of(slot.module))]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} vision towers that packvit runs, and must "
            f"hold one. It runs: {', '.join(KINDS)}."
        )
    [(slot, family)] = found
    tower: Any = slot.module
    kind = KINDS[type(tower).__name__]
    kind.check(model)
    encoder = family.from_transformers(
        tower,
        patch_order="chw",
        positions="interpolate" if family.family.reference.interpolates else "checkpoint",
    )
    encoder.train(tower.training)
    freeze_alike(encoder, tower)
    setattr(slot.parent, slot.name, kind(encoder, tower))
    return encoder


def restore_tower(model: nn.Module) -> nn.Module:
    """Put a model's own vision tower back, with the weights that ours has now; return the tower.

    Raises: ValueError where `replace_tower` replaced none.
    """
    found = [slot for slot in slots(model) if isinstance(slot.module, TowerInPlace)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no tower of packvit's: nothing to restore.")
    [slot] = found
    ours = slot.module
    assert isinstance(ours, TowerInPlace)
    weights = ours.encoder.state_dict()
    tower = as_theirs(ours, weights).to(ours.encoder.device).train(ours.training)
    flags = {name: weight.requires_grad for name, weight in ours.encoder.named_parameters()}
    if all(flags.values()) or not any(flags.values()):
        tower.requires_grad_(all(flags.values()))
    else:  # names and shapes differ, so ones and zeros take the way of the weights
        marks = {name: torch.full_like(weights[name], flag) for name, flag in flags.items()}
        marked = as_theirs(ours, weights | marks)
        for weight, mark in zip(tower.parameters(), marked.parameters(), strict=True):
            weight.requires_grad_(bool(mark.any()))
    setattr(slot.parent, slot.name, tower)
    return tower


def as_theirs(ours: TowerInPlace, weights: Mapping[str, Tensor]) -> Any:
    """Return the tower that an encoder stands for, with these weights of the encoder."""
    with TemporaryDirectory() as folder:
        ours.encoder.save_pretrained(folder, state_dict=weights)
        return ours.theirs.from_pretrained(folder, config=ours.config, dtype=ours.dtype)


def freeze_alike(encoder: Encoder, tower: nn.Module) -> None:
    """Freeze what is frozen of the tower that an encoder was made from.

    Raises: ValueError naming weights of ours that join frozen ones to others.
    """
    flags = {weight.requires_grad for weight in tower.parameters()}
    if len(flags) == 1:
        encoder.requires_grad_(flags.pop())
        return
    marked = copy.deepcopy(tower).requires_grad_(False)
    for mark, weight in zip(marked.parameters(), tower.parameters(), strict=True):
        mark.fill_(weight.requires_grad)
    marks = dict(type(encoder).from_transformers(marked).named_parameters())
    joined = [name for name, mark in marks.items() if bool(mark.any()) is not bool(mark.all())]
    if joined:
        raise ValueError(
            "The model's vision tower is frozen in part, and one weight of ours holds both frozen "
            f"and other weights of it: {', '.join(joined)}. Freeze all that is joined there or "
            "nothing, or choose among the encoder's parameters after this."
        )
    for name, weight in encoder.named_parameters():
        weight.requires_grad_(bool(marks[name].any()))


def slots(model: nn.Module) -> list[Slot]:
    """Return every module within a model, with where it is held."""
    return [
        Slot(parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]


def family_of(module: nn.Module) -> type[Encoder] | None:
    """Return the class of ours that runs a module of transformers, or None."""
    config: Any = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    if type(module).__name__ not in KINDS:
        return None
    return next((each for each in FAMILIES if kind in each.family.model_types), None)
