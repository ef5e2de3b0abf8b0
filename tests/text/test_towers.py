"""Text towers beside transformers', on small random weights where every tensor matters."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import two_towers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, CLIPConfig

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.text.encoder import TextEncoder
from packvit.text.towers import CLIP, TEXT_TOWERS, TextTower
from packvit.verification.rule import judge

KINDS = [*two_towers.KINDS]


def loaded(folder: Path, model: Any, **options: Any) -> TextEncoder:
    model.save_pretrained(folder)
    return packvit.load_text(folder, **options)


def misses(text: TextEncoder, model: Any) -> list[str]:
    ids = two_towers.draw_texts(text.config.padded)
    lengths = [len(each) for each in ids]
    found = text.encode(torch.cat(ids).to(text.device), lengths)
    theirs = two_towers.run(model, ids)
    truth = two_towers.run(copy.deepcopy(model).double(), ids)
    ours: dict[str, Any] = {"tokens": found.tokens.split(lengths), "pooled": found.pooled.split(1)}
    if found.projected is not None:
        ours["projected"] = found.projected.split(1)
    assert [name for name in theirs if theirs[name]] == [*ours]
    return [
        f"{name}: {judged}"
        for name in ours
        for judged in judge(ours[name], theirs[name], truth[name], dtype=text.dtype, blocks=3)
        if not judged.passed
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_of_texts_equals_the_reference_on_each_text(tmp_path: Path, kind: str):
    model = two_towers.build(kind)
    text = loaded(tmp_path, model)
    assert misses(text, model) == []
    assert text.logit_scale is not None
    assert torch.equal(text.logit_scale, model.logit_scale.reshape(1))
    bias = getattr(model, "logit_bias", None)
    found = None if text.logit_bias is None else text.logit_bias.item()
    assert found == (None if bias is None else bias.item())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_close_to_float64_as_the_bf16_reference(tmp_path: Path, kind: str):
    model = two_towers.build(kind, hidden_size=256)
    text = loaded(tmp_path, model, dtype="bfloat16")
    assert text.logit_scale is not None
    assert text.logit_scale.dtype == torch.float32
    assert misses(text, model.bfloat16()) == []


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip", "aimv2"])
def test_gradients_equal_the_references(tmp_path: Path, kind: str):
    model = two_towers.build(kind)
    text = loaded(tmp_path, model)
    images = torch.randn(4, text.width, generator=torch.Generator().manual_seed(1))
    ids = two_towers.draw_texts(text.config.padded, 4)

    vectors = text.encode(torch.cat(ids), [len(each) for each in ids]).vectors()
    text.logits(images, vectors).square().sum().backward()
    pooled = [
        model.text_model(each[None], attention_mask=torch.ones_like(each)[None]).pooler_output
        for each in ids
    ]
    theirs = torch.cat(pooled)
    theirs = model.text_projection(theirs) if hasattr(model, "text_projection") else theirs
    cosines = torch.cosine_similarity(images[:, None], theirs[None], dim=-1)
    bias = getattr(model, "logit_bias", 0.0)
    (cosines * model.logit_scale.exp() + bias).square().sum().backward()

    ours, wanted = gradients(text), gradients(model)
    assert ours.keys() == dict(text.named_parameters()).keys()
    for mine, name in {
        "embeddings.tokens.weight": "text_model.embeddings.token_embedding.weight",
        "embeddings.positions": "text_model.embeddings.position_embedding.weight",
        "encoder.layers.0.attention.out.weight": (
            f"text_model.encoder.layers.0.{'attention' if kind == 'aimv2' else 'self_attn'}"
            ".out_proj.weight"
        ),
        "logit_scale": "logit_scale",
    }.items():
        found, exact = ours[mine].reshape(wanted[name].shape), wanted[name]
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max(), name


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "aimv2"])
@pytest.mark.parametrize("scale", [2.5, 5.5])
def test_pairs_of_images_and_texts_are_as_likely_as_the_reference_says(
    tmp_path: Path, kind: str, scale: float
):
    model = two_towers.build(kind)
    with torch.no_grad():
        model.logit_scale.fill_(scale)  # the larger is beyond what LiT allows
    text = loaded(tmp_path, model)
    encoder = packvit.load(tmp_path)
    ids = torch.stack(two_towers.draw_texts(True, 5))
    grid = torch.tensor([[1, 5, 5]] * 3)
    patches = reference.draw_patches(grid.tolist(), encoder.config.patch_dim)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "siglip2":
        given |= {"pixel_values": patches.view(3, 25, -1), "spatial_shapes": grid[:, 1:]}
        given["pixel_attention_mask"] = torch.ones(3, 25, dtype=torch.int64)
    else:
        tiles = patches.view(3, 5, 5, 14, 14, 3).permute(0, 5, 1, 3, 2, 4)
        given["pixel_values"] = tiles.reshape(3, 3, 70, 70)
    with torch.no_grad():
        wanted = model(**given).logits_per_image
        images = encoder.encode(patches, grid, projected=encoder.text_space == "projected")
        texts = text.encode(ids.flatten(), [ids.shape[1]] * 5)
        logits = text.logits(images.vectors(), texts.vectors())
        likely = text.probabilities(images.vectors(), texts.vectors())
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    exact = wanted.sigmoid() if kind.startswith("siglip") else wanted.softmax(-1)
    assert (likely - exact).abs().max() <= 1e-4


def test_embed_gives_the_references_text_features_of_words(tmp_path: Path):
    model = two_towers.build("clip")
    model.save_pretrained(tmp_path)
    tokenizer = two_towers.write_clip_tokenizer(tmp_path)
    words = ["a photo of a cat", "", "red bicycles " * 20, *(f"{n} dogs" for n in range(20))]
    text = packvit.load_text(tmp_path)
    found = text.embed(words, token_budget=40)
    with torch.no_grad():
        inputs = tokenizer(words, padding=True, truncation=True, return_tensors="pt")
        wanted = model.get_text_features(**inputs).pooler_output.numpy()
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert text.embed([]).shape == (0, text.width)


@pytest.mark.parametrize("kind", ["clip", "clip, largest id", "siglip"])
def test_a_text_knows_nothing_of_its_neighbours(tmp_path: Path, kind: str):
    text = loaded(tmp_path, two_towers.build(kind))
    ids = two_towers.draw_texts(text.config.padded, 6)
    lengths = [len(each) for each in ids]
    before = text.encode(torch.cat(ids), lengths)
    ids[0] = torch.full_like(ids[0], 5)
    after = text.encode(torch.cat(ids), lengths)
    assert torch.equal(before.pooled[1:], after.pooled[1:])
    assert torch.equal(before.tokens[lengths[0] :], after.tokens[lengths[0] :])
    assert not torch.equal(before.pooled[0], after.pooled[0])


def test_a_token_of_clip_knows_nothing_of_those_behind_it(tmp_path: Path):
    text = loaded(tmp_path, two_towers.build("clip"))
    ids = torch.arange(2, 12)
    before = text(ids, [10])
    ids[7] = 99
    after = text(ids, [10])
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


def test_apples_names_give_what_transformers_names_give(tmp_path: Path):
    text = loaded(tmp_path / "theirs", two_towers.build("aimv2"))
    names = {
        "text_projection.weight": "text_projector.weight",
        "logit_scale": "log_logit_scale",
        "text_model.rms_norm.weight": "text_encoder.trunk.post_trunk_norm.weight",
        "visual_projection.weight": "image_projector.weight",
        "text_model.embeddings.token_embedding.weight": (
            "text_encoder.preprocessor.text_embedding.weight"
        ),
        "text_model.embeddings.position_embedding.weight": (
            "text_encoder.preprocessor.positional_embedding"
        ),
    }
    parts = {
        "rms_norm1": "norm_1",
        "rms_norm2": "norm_2",
        "attention.out_proj": "attn.proj",
        "ffn.gate_proj": "mlp.fc1",
        "ffn.up_proj": "mlp.fc3",
        "ffn.down_proj": "mlp.fc2",
    }
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    apple = {}
    for name, tensor in theirs.items():
        if name.startswith("vision_model."):
            apple[name.replace("vision_model.", "image_encoder.")] = tensor
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d)\.(.+)\.(\w+)", name):
            layer, part, kind = match.groups()
            where = f"text_encoder.trunk.blocks.{layer}."
            if part in parts:
                apple[f"{where}{parts[part]}.{kind}"] = tensor
            elif part == "attention.q_proj":
                three = (theirs[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
                apple[f"{where}attn.qkv.{kind}"] = torch.cat(list(three))
        else:
            apple[names[name]] = tensor
    (tmp_path / "apple").mkdir()
    save_file(apple, tmp_path / "apple" / "model.safetensors")
    config = (tmp_path / "theirs" / "config.json").read_bytes()
    (tmp_path / "apple" / "config.json").write_bytes(config)
    again = packvit.load_text(tmp_path / "apple")
    for mine, other in zip(text.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_read_or_named(tmp_path: Path, kind: str):
    loaded(tmp_path, two_towers.build(kind))
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    ours = [name for name in whole if not name.startswith(("vision_model.", "visual_"))]
    last = sorted(ours)[-1]
    missing = {name: tensor for name, tensor in whole.items() if name != last}
    save_file(missing, path)
    with pytest.raises(CheckpointError, match=f"(missing: |text towers).*{re.escape(last)}"):
        packvit.load_text(tmp_path)
    save_file(whole | {"text_model.encoder.layers.3.x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: text_model\.encoder\.layers\.3\.x"):
        packvit.load_text(tmp_path)
    old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file({f"model.{name}": tensor for name, tensor in (whole | old).items()}, path)
    scale = packvit.load_text(tmp_path).logit_scale  # behind a wrapper's name
    assert scale is not None
    assert scale.item() == 2.5


def test_what_is_no_text_tower_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no text tower.*clip, siglip, siglip2, aimv2"):
        packvit.load_text("tiny")
    alone = reference.build("aimv2")
    alone.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no text tower"):
        packvit.load_text(tmp_path)
    text = loaded(tmp_path / "clip", two_towers.build("clip"))
    ids = torch.arange(2, 12)
    for given, lengths, words in (
        (ids, [9], r"\[10\] and lengths sum to 9 tokens of 1 texts"),
        (ids, [10, 0], r"from 0 to 10, but .* 1 to 16 tokens"),
        (torch.arange(2, 22), [20], r"from 20 to 20, but .* 1 to 16 tokens"),
        (ids + 800, [10], r"from 802 to 811, but the vocabulary has the ids 0 to 799"),
    ):
        with pytest.raises(ValueError, match=words):
            text(given, lengths)
    with pytest.raises(TypeError, match="float32, but must be"):
        text(ids.float(), [10])
    with pytest.raises(TypeError, match="single text is a list of one"):
        text.embed("a cat")
    with pytest.raises(ValueError, match="token_budget is 8, but one text may have 16"):
        text.embed(["a cat"], token_budget=8)


@pytest.mark.parametrize(("kind", "key"), [("clip", "text_config_dict"), ("clip", "text_config")])
def test_what_a_config_leaves_out_is_its_class_default(kind: str, key: str):
    whole = CLIPConfig(text_config={}, vision_config={}).to_dict()
    whole["text_config"]["eos_token_id"] = 49407
    assert CLIP.read({"model_type": "clip", key: {}}) == CLIP.read(whole)


@pytest.mark.parametrize("tower", TEXT_TOWERS, ids=lambda tower: tower.name)
def test_sizes_left_out_are_those_of_the_reference(tower: TextTower):
    config: Any = CONFIG_MAPPING[tower.model_types[0]]
    whole = config(text_config={}, vision_config={}).to_dict()
    assert tower.read({}) == tower.read(whole)


def test_bytes_that_are_no_unicode_are_refused(tmp_path: Path):
    two_towers.build("clip").save_pretrained(tmp_path)
    two_towers.write_clip_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"Text 1 is not valid Unicode: 'caf.udce9'"):
        packvit.load_text(tmp_path).embed(["a cat", b"caf\xe9".decode("utf-8", "surrogateescape")])


def test_a_copy_and_a_pickle_say_the_same(tmp_path: Path):
    two_towers.build("clip").save_pretrained(tmp_path)
    two_towers.write_clip_tokenizer(tmp_path)
    text = packvit.load_text(tmp_path)
    wanted = text.embed(["a cat"])
    assert np.array_equal(copy.deepcopy(text).embed(["a cat"]), wanted)
    assert np.array_equal(pickle.loads(pickle.dumps(text)).embed(["a cat"]), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["auto", "torch", "sdpa"])
def test_on_the_gpu_every_backend_is_as_close_as_the_reference(
    tmp_path: Path, kind: str, attention: str
):
    model = two_towers.build(kind, hidden_size=256)
    text = loaded(tmp_path, model, device="cuda", dtype="bfloat16", attention=attention)
    assert misses(text, model.bfloat16()) == []
