"""Checkpoints whose tensors stand behind a prefix, or beside a classifier: W6 of the cases."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import packvit
from packvit.checkpoints.errors import CheckpointError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODELS: dict[str, tuple[str, str]] = {  # of transformers: the encoder, and its classifier
    "DINOv2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "SigLIP": ("SiglipVisionModel", "SiglipForImageClassification"),
    "CLIP": ("CLIPVisionModel", "CLIPForImageClassification"),
    "AIMv2": ("Aimv2VisionModel", ""),
    "DINOv3": ("DINOv3ViTModel", ""),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    kind: Any = getattr(transformers, name)
    two = "vision_config" in kind.config_class.sub_configs
    text = {"hidden_size": 32, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vision_config": SMALL, "text_config": text} if two else SMALL
    return kind(kind.config_class(**sizes)).eval()


def rename(folder: Path, prefix: str, more: dict[str, torch.Tensor] | None = None) -> None:
    """Write `prefix` before the name of every tensor."""
    file = folder / "model.safetensors"
    save_file({prefix + name: x for name, x in load_file(file).items()} | (more or {}), file)


def same_weights(one: packvit.Encoder, other: packvit.Encoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "vision_tower.", "module._orig_mod."])
@pytest.mark.parametrize("family", MODELS)
def test_what_a_wrapper_writes_before_every_name_is_no_obstacle(
    tmp_path: Path, family: str, prefix: str
):
    make(MODELS[family][0]).save_pretrained(tmp_path)
    plain = packvit.load(tmp_path)
    rename(tmp_path, prefix)
    assert same_weights(packvit.load(tmp_path), plain)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("family", [name for name, (_, head) in MODELS.items() if head])
def test_a_classifier_is_loaded_without_its_last_matrix(tmp_path: Path, family: str, prefix: str):
    model = make(MODELS[family][1])
    model.save_pretrained(tmp_path)
    rename(tmp_path, prefix)
    found = packvit.load(tmp_path)
    assert found.skipped == (f"{prefix}classifier.bias", f"{prefix}classifier.weight")
    within = model.base_model if family in ("DINOv2", "registers") else model.vision_model
    patches = torch.rand(1, 3, 28, 28)
    with torch.inference_mode():
        exact = within(patches).last_hidden_state[:, -4:]
        flat = torch.nn.functional.unfold(patches, 14, stride=14).transpose(1, 2)
        ours = flat[0].unflatten(1, (3, 196)).transpose(1, 2).flatten(1)
        assert (found(ours, [(1, 2, 2)]) - exact[0]).abs().max() < 1e-5
    assert same_weights(type(found).from_transformers(model), found)


def test_both_towers_behind_a_prefix_are_told_apart(tmp_path: Path):
    model = make("CLIPModel")
    model.save_pretrained(tmp_path)
    plain = packvit.load(tmp_path)
    assert plain.projection is not None
    rename(tmp_path, "module.")
    found = packvit.load(tmp_path)
    assert same_weights(found, plain)
    assert found.skipped == tuple(f"module.{name}" for name in plain.skipped)


def test_two_copies_are_refused_by_their_prefixes(tmp_path: Path):
    make("Dinov2Model").save_pretrained(tmp_path)
    rename(tmp_path, "student.")
    students = load_file(tmp_path / "model.safetensors")
    teachers = {f"teacher{name.removeprefix('student')}": x.clone() for name, x in students.items()}
    save_file(students | teachers, tmp_path / "model.safetensors")
    said = 'it holds one behind "student.", one behind "teacher."'
    with pytest.raises(packvit.CheckpointError, match=said):
        packvit.load(tmp_path)


def test_what_stands_outside_the_prefix_is_named(tmp_path: Path):
    make("Dinov2Model").save_pretrained(tmp_path)
    rename(tmp_path, "vision_tower.", {"projector.weight": torch.zeros(2)})
    with pytest.raises(packvit.CheckpointError, match=r"unexpected: projector\.weight"):
        packvit.load(tmp_path)


def test_a_classifier_matrix_without_a_classifier_is_unexpected(tmp_path: Path):
    make("Dinov2Model").save_pretrained(tmp_path)
    rename(tmp_path, "", {"classifier.weight": torch.zeros(2)})
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Dinov2Model"]
    with pytest.raises(packvit.CheckpointError, match=r"unexpected: classifier\.weight"):
        packvit.load(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_wrapper_of_a_block_writes_into_names_is_no_obstacle(tmp_path: Path, sharded: bool):
    model = make("Dinov2Model")
    model.save_pretrained(tmp_path)
    plain = packvit.load(tmp_path)
    tensors = {  # as where every block is compiled
        re.sub(r"^(encoder\.layer\.\d+\.)", r"\1_orig_mod.", name): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert "encoder.layer.0._orig_mod.norm1.weight" in tensors
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        shards = {f"model-{number}.safetensors": names[number::2] for number in (0, 1)}
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, tmp_path / file)
        placed = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": {}, "weight_map": placed}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    assert same_weights(packvit.load(tmp_path), plain)


def test_a_tensor_that_is_there_with_and_without_its_wrapper_is_not_chosen(tmp_path: Path):
    make("Dinov2Model").save_pretrained(tmp_path)
    twice = {"encoder.layer.0._orig_mod.norm1.weight": torch.zeros(32)}
    rename(tmp_path, "", twice)
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.layer\.0\.\S*norm1\.weight"):
        packvit.load(tmp_path)
