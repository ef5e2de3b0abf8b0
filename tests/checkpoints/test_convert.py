"""One layout to another: every bit of every tensor that is ours, and the names of all others."""

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from full_disk import no_file_over
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

import packvit
from packvit import hub
from packvit.checkpoints.errors import CheckpointError

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
IMAGES = {"image_mean": [0.5, 0.5, 0.5], "do_resize": False, "our_own": "note"}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bits(tensor: Tensor) -> bytes:
    """What a tensor is to the last bit, -0.0 and subnormal numbers included."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert kept, name
        assert bits(found[name]) == bits(tensor), name


def spiked(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in `dtype`, each with numbers that a cast or a sum would lose."""
    spiked = {}
    for name, tensor in tensors.items():
        spiked[name] = tensor.detach().clone().to(dtype).contiguous()
        ends = spiked[name].view(-1).view(torch.uint8)
        size = spiked[name].element_size()
        ends[:size] = 0
        ends[0] = 1  # the smallest subnormal number
        ends[-size:] = 0
        ends[-1] = 0x80  # -0.0
    return spiked


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    save_file(tensors, folder / WEIGHTS)
    return folder


def aimv2(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write an AIMv2 in transformers' layout with no help from packvit."""
    model = reference.aimv2(**changes)
    return write(folder, model.config.to_dict(), spiked(dict(model.state_dict()), dtype))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [{"is_native": True}, {}, {"use_head": False, "qkv_bias": True, "mlp_bias": True}],
    ids=["native", "fixed", "headless"],
)
def test_every_bit_survives_the_way_there_and_back(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
):
    source = aimv2(tmp_path / "a", dtype, **changes)
    there = hub.convert(source, tmp_path / "b", "original")
    expected = reference.to_apple(weights(source))
    check_same(weights(tmp_path / "b"), expected)
    assert (there.tensors, there.layout, there.skipped) == (len(expected), "original", ())
    assert there.bytes == (tmp_path / "b" / WEIGHTS).stat().st_size
    hub.convert(tmp_path / "b", tmp_path / "c", "transformers")
    check_same(weights(tmp_path / "c"), weights(source))
    before, after = (packvit.load(tmp_path / side) for side in "ac")
    assert (after.config, after.images) == (before.config, before.images)
    said = json.loads((tmp_path / "c" / "preprocessor_config.json").read_text())
    assert said == IMAGES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_what_was_converted_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    model = reference.aimv2(is_native=True)
    apple = reference.to_apple(spiked(dict(model.state_dict()), dtype))
    config = model.config.to_dict() | {"model_type": "aimv2"}
    hub.convert(write(tmp_path / "a", config, apple), tmp_path / "b", "transformers")
    kind: Any = Aimv2VisionModel
    read, info = kind.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    check_same(reference.to_apple(dict(read.state_dict())), apple)


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path):
    tensors = spiked(dict(reference.aimv2().state_dict()), torch.bfloat16)
    tensors |= {n: t.float() for n, t in tensors.items() if "norm" in n}
    tensors |= {n: t.double() for n, t in tensors.items() if "layers.1.attention" in n}
    config = reference.aimv2().config.to_dict()
    hub.convert(write(tmp_path / "a", config, tensors), tmp_path / "b", "original")
    hub.convert(tmp_path / "b", tmp_path / "c", "transformers")
    check_same(weights(tmp_path / "c"), tensors)


def test_dtypes_that_cannot_be_one_tensor_are_named(tmp_path: Path):
    source = aimv2(tmp_path / "a", torch.bfloat16)
    tensors = weights(source)
    key, gate = "encoder.layers.1.attention.k_proj.weight", "encoder.layers.2.ffn.gate_proj.weight"
    tensors |= {name: tensors[name].float() for name in (key, gate)}
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        hub.convert(source, tmp_path / "b", "original")
    _, *problems = str(caught.value).splitlines()
    assert len(problems) == 2
    assert "of different dtypes, but one tensor of ours: encoder.layers.1." in problems[0]
    assert f"q_proj.weight torch.bfloat16, {key} torch.float32, " in problems[0]
    assert f"{gate} torch.float32, " in problems[1]
    assert not (tmp_path / "b").exists()
    assert packvit.load(source).dtype == torch.float32  # loading casts, and so it may


def lit(folder: Path) -> tuple[Path, Any]:
    config = Aimv2Config(
        vision_config=reference.TINY | {"use_head": True}, text_config=TEXT, projection_dim=24
    )
    model: Any = reference.randomise(Aimv2Model(config)).bfloat16()
    model.save_pretrained(folder)
    return folder, model


def test_lit_goes_both_ways_with_its_projection_and_without_its_text_tower(tmp_path: Path):
    source, model = lit(tmp_path / "a")
    there = hub.convert(source, tmp_path / "b", "original")
    tower = reference.to_apple(dict(model.vision_model.state_dict()))
    expected = {f"image_encoder.{name}": tensor for name, tensor in tower.items()}
    expected["image_projector.weight"] = model.visual_projection.weight
    check_same(weights(tmp_path / "b"), expected)
    ours = {"vision_model", "visual_projection"}
    rest = {name for name in weights(source) if name.split(".")[0] not in ours}
    assert set(there.skipped) == rest
    assert {"text_projection.weight", "logit_scale"} < rest
    back = hub.convert(tmp_path / "b", tmp_path / "c", "transformers")
    check_same(weights(tmp_path / "c"), {n: t for n, t in weights(source).items() if n not in rest})
    assert back.skipped == ()


def clip(folder: Path) -> Path:
    config = CLIPConfig(vision_config=reference.TINY, text_config=TEXT, projection_dim=24)
    model = reference.randomise(CLIPModel(config)).half()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    return write(folder, config.to_dict(), tensors)


def test_clip_leaves_its_text_tower_and_carries_what_nothing_uses(tmp_path: Path):
    source = clip(tmp_path / "a")
    made = hub.convert(source, tmp_path / "b", "transformers")
    kept, left = weights(tmp_path / "b"), set(made.skipped)
    check_same(kept, {n: t for n, t in weights(source).items() if n not in left})
    assert kept["vision_model.embeddings.position_ids"].dtype == torch.int64
    assert {name.split(".")[0] for name in left} == {
        "text_model",
        "text_projection",
        "logit_scale",
    }
    assert made.skipped == tuple(sorted(left))
    kind: Any = CLIPVisionModelWithProjection
    read, info = kind.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    assert read.dtype == torch.float16


def test_an_encoder_names_what_it_left_unread(tmp_path: Path):
    both, alone = packvit.load(clip(tmp_path / "a")), packvit.load(aimv2(tmp_path / "b"))
    text = {n for n in weights(tmp_path / "a") if n.split(".")[0] == "text_model"}
    assert set(both.skipped) == text | {"text_projection.weight", "logit_scale"}
    assert alone.skipped == ()


def test_shards_become_one_file(tmp_path: Path):
    model = reference.aimv2(is_native=True)
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    hub.convert(tmp_path / "a", tmp_path / "b", "transformers")
    check_same(weights(tmp_path / "b"), dict(model.state_dict()))
    assert not (tmp_path / "b" / "preprocessor_config.json").exists()


def test_a_folder_that_holds_anything_is_refused_before_anything_is_read(tmp_path: Path):
    absent = tmp_path / "no checkpoint"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is not a folder\. Choose another one"):
        hub.convert(absent, tmp_path / "file", "original")
    with pytest.raises(ValueError, match=r"is not empty: it holds file\. Choose a new or"):
        hub.convert(absent, tmp_path, "original")
    (tmp_path / "other").touch()
    with pytest.raises(ValueError, match=r"it holds file and 1 more\. Choose"):
        hub.convert(absent, tmp_path, "original")
    (tmp_path / "empty").mkdir()
    source = aimv2(tmp_path / "a")
    hub.convert(source, tmp_path / "empty", "transformers")
    check_same(weights(tmp_path / "empty"), weights(source))


def test_a_layout_that_the_family_does_not_have_is_refused_with_those_there_are(tmp_path: Path):
    source = clip(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r'CLIP has no layout "original". Choose one of: "transformers"\.'
    ):
        hub.convert(source, tmp_path / "b", "original")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("limit", [10, 4096])
def test_a_disk_that_fills_up_leaves_no_checkpoint(tmp_path: Path, limit: int):
    source = aimv2(tmp_path / "a")
    with (
        no_file_over(limit),
        pytest.raises(hub.CheckpointError, match="The checkpoint cannot be written to"),
    ):
        hub.convert(source, tmp_path / "b", "original")
    assert list((tmp_path / "b").iterdir()) == []
