"""Text towers saved by themselves, and TIPSv2's, beside transformers'."""

import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import two_towers
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2TextConfig,
    Aimv2TextModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
    Tipsv2Config,
    Tipsv2Model,
    Tipsv2TextConfig,
    Tipsv2TextModel,
)

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.fast.blocks import fits
from packvit.text.encoder import TextEncoder

ALONE: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip": (CLIPTextModel, CLIPTextConfig, {}),
    "clip, projected": (CLIPTextModelWithProjection, CLIPTextConfig, {"projection_dim": 24}),
    "siglip": (SiglipTextModel, SiglipTextConfig, {"projection_size": 40}),
    "siglip2": (Siglip2TextModel, Siglip2TextConfig, {}),
    "aimv2": (Aimv2TextModel, Aimv2TextConfig, {"attn_implementation": "eager"}),
    "tipsv2": (Tipsv2TextModel, Tipsv2TextConfig, {}),
}


def build(kind: str) -> Any:
    model, config, own = ALONE[kind]
    return reference.randomise(model(config(**two_towers.TEXT | own)), 3)


def assert_equal_outputs(text: TextEncoder, model: Any) -> None:
    ids = two_towers.draw_texts(text.config.padded, 8)
    found = text.encode(torch.cat(ids), [len(each) for each in ids])
    ours = found.tokens.split(found.lengths)
    with torch.no_grad():
        for place, each in enumerate(ids):
            theirs = model(each[None], attention_mask=torch.ones_like(each)[None])
            close(ours[place], theirs.last_hidden_state[0])
            if hasattr(theirs, "text_embeds"):
                assert found.projected is not None
                close(found.projected[place], theirs.text_embeds[0])
            else:
                assert found.projected is None
                close(found.pooled[place], theirs.pooler_output[0])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ALONE)
def test_a_tower_saved_alone_gives_what_the_reference_gives(tmp_path: Path, kind: str):
    model = build(kind)
    model.save_pretrained(tmp_path)
    text = packvit.load_text(tmp_path)
    assert_equal_outputs(text, model)
    assert text.logit_scale is None
    assert text.logit_bias is None
    with pytest.raises(ValueError, match="saved alone, without the scale of logits"):
        text.probabilities(torch.ones(1, text.width), torch.ones(2, text.width))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"other.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: other\.weight"):
        packvit.load_text(tmp_path)


def test_a_tower_of_older_names_is_read_too(tmp_path: Path):
    """Older transformers, and so the text encoders of diffusion models, write a prefix."""
    model = build("clip")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, path)
    assert_equal_outputs(packvit.load_text(tmp_path), model)


@pytest.fixture(scope="module")
def tips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tipsv2")
    images = reference.TINY | {"hidden_size": two_towers.TEXT["hidden_size"]}
    images.pop("intermediate_size", None)
    made = Tipsv2Config(text_config=two_towers.TEXT, vision_config=images)
    model: Any = reference.randomise(Tipsv2Model(made), 5)
    with torch.no_grad():
        model.temperature.fill_(0.04)
    model.save_pretrained(folder)
    return folder, model


def test_tipsv2s_pairs_are_as_likely_as_the_reference_says(tips: tuple[Path, Any]):
    folder, model = tips
    text, encoder = packvit.load_text(folder), packvit.load(folder)
    assert encoder.text_space == "pooled"
    assert_equal_outputs(text, model.text_model)
    ids = two_towers.draw_texts(False, 5)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], True)
    grid = torch.tensor([[1, 5, 5]] * 3)
    patches = reference.draw_patches(grid.tolist(), encoder.config.patch_dim)
    tiles = patches.view(3, 5, 5, 14, 14, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 70, 70)
    with torch.no_grad():
        wanted = model(input_ids=padded, attention_mask=mask, pixel_values=tiles).logits_per_image
        images = encoder.encode(patches, grid).vectors()
        words = text.encode(torch.cat(ids), [len(each) for each in ids]).vectors()
    close(text.logits(images, words), wanted)
    assert (text.probabilities(images, words) - wanted.softmax(-1)).abs().max() <= 1e-4


def test_tipsv2_without_a_temperature_has_its_configs(tmp_path: Path, tips: tuple[Path, Any]):
    folder, _ = tips
    tensors = load_file(folder / "model.safetensors")
    del tensors["temperature"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    scale = packvit.load_text(tmp_path).logit_scale
    assert scale is not None
    assert scale.item() == pytest.approx(-math.log(0.005065968260169029), rel=1e-6)


def test_tipsv2s_gradients_equal_the_references(tips: tuple[Path, Any]):
    folder, model = tips
    text = packvit.load_text(folder)
    ids = two_towers.draw_texts(False, 4)
    text.encode(torch.cat(ids), [len(each) for each in ids]).vectors().square().sum().backward()
    model.zero_grad()
    outputs = [
        model.text_model(each[None], attention_mask=torch.ones_like(each)[None]).pooler_output
        for each in ids
    ]
    torch.cat(outputs).square().sum().backward()
    ours = dict(text.named_parameters())["embeddings.tokens.weight"].grad
    assert ours is not None
    close(ours, model.text_model.embeddings.token_embedding.weight.grad)
    assert not any(name.endswith("positions") for name, _ in text.named_parameters())


def test_a_text_without_tokens_is_refused_in_a_sentence(tips: tuple[Path, Any]):
    text = packvit.load_text(tips[0])
    with pytest.raises(ValueError, match="Text 1 has no tokens: it is empty"):
        text.lay([[4, 5], []])


def test_blocks_with_relu_are_left_to_the_plain_steps(tips: tuple[Path, Any]):
    block: Any = packvit.load_text(tips[0]).encoder.layers[0]
    assert not fits(block, torch.float32)
    block.mlp.activation = "gelu"
    assert fits(block, torch.float32)
