"""AIMv2 against transformers, image by image, on weights and grids drawn at random."""

import json
from pathlib import Path
from typing import Any

import judged
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionConfig, Aimv2VisionModel

import packvit
from packvit.checkpoints import parameters as weights
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import LayoutName
from packvit.config import ShortestEdge, SinCos, Table
from packvit.families.aimv2 import FAMILY, AIMv2Packing

LIMIT = 5e-6  # scaled difference in fp32 of two paths through the same arithmetic

ODD = [(1, 1, 1), (1, 1, 23), (1, 19, 1), (1, 3, 17), (2, 4, 6), (1, 17, 3)]
NATIVE = {"is_native": True}
OWN = [(1, 5, 5), (3, 5, 5), (1, 5, 5)]  # the fixed variant's one grid


def compare(encoder: Any, model: Any, grid: list[tuple[int, int, int]], seed: int = 0) -> None:
    patches = reference.draw_patches(grid, encoder.config.patch_dim, seed)
    layers = range(encoder.config.layers)
    found = encoder.encode(patches, torch.tensor(grid), taps=layers)
    assert list(found.taps) == list(layers)
    assert (found.pooled is None) is (encoder.config.pool is None)
    assert judged.misses(found, model, patches, grid) == []


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_native_equals_the_reference_on_any_grid(head: bool, bias: bool):
    model = reference.aimv2(use_head=head, qkv_bias=bias, mlp_bias=bias, **NATIVE)
    compare(AIMv2Packing.from_transformers(model), model, ODD)


@pytest.mark.parametrize("images", [1, 2, 7, 64])
def test_native_equals_the_reference_for_any_number_of_images(images: int):
    model = reference.aimv2(seed=images, **NATIVE)
    generator = torch.Generator().manual_seed(images)
    sides = torch.randint(1, 12, (images, 2), generator=generator).tolist()
    compare(AIMv2Packing.from_transformers(model), model, [(1, *pair) for pair in sides], images)


def test_fixed_resolution_equals_the_reference_at_its_own_grid():
    model = reference.aimv2()
    compare(AIMv2Packing.from_transformers(model), model, OWN)


def test_layers_of_the_real_size_equal_the_reference():
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    model = reference.aimv2(**large, **NATIVE, num_hidden_layers=4)
    compare(AIMv2Packing.from_transformers(model), model, [(1, 3, 17), (1, 16, 11), (1, 1, 5)])


@pytest.mark.parametrize("kind", ["native", "fixed"])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_both_layouts_load_to_the_same_numbers(tmp_path: Path, kind: str, layout: str):
    model = reference.aimv2(**(NATIVE if kind == "native" else {}))
    write(tmp_path, model, layout)
    compare(packvit.load(tmp_path), model, ODD if kind == "native" else OWN)


def write(folder: Path, model: Any, layout: str) -> None:
    """Write a checkpoint in a published layout, with no help from packvit."""
    if layout == "transformers":
        model.save_pretrained(folder)
        return
    config = model.config.to_dict() | {"model_type": "aimv2", "use_bias": False}
    absent = {"is_native", "use_head", "mlp_bias"} | (
        {"image_size"} if config["is_native"] else set()
    )
    kept = {name: value for name, value in config.items() if name not in absent}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kept))
    save_file(reference.to_apple(dict(model.state_dict())), folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["native", "fixed", "headless"])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_a_round_trip_is_bit_identical(tmp_path: Path, kind: str, layout: LayoutName):
    changes = {"native": NATIVE, "fixed": {}, "headless": {"use_head": False}}[kind]
    write(tmp_path / "in", reference.aimv2(**changes), layout)
    packvit.load(tmp_path / "in").save_pretrained(tmp_path / "out", layout=layout)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    there, back = (packvit.load(tmp_path / side) for side in ("in", "out"))
    assert back.config == there.config


@pytest.mark.parametrize(
    "changes", [NATIVE, {}, {"use_head": False, "qkv_bias": True, "mlp_bias": True}]
)
def test_transformers_loads_what_we_write(tmp_path: Path, changes: dict[str, Any]):
    write(tmp_path / "in", reference.aimv2(**changes), "transformers")
    encoder = packvit.load(tmp_path / "in", patch_order="chw")
    encoder.save_pretrained(tmp_path / "out")
    load: Any = Aimv2VisionModel.from_pretrained
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    hwc = AIMv2Packing.from_pretrained(tmp_path / "out")
    compare(hwc, model.eval(), ODD if changes == NATIVE else OWN)


def test_the_layouts_convert_into_each_other(tmp_path: Path):
    write(tmp_path / "a", reference.aimv2(), "original")
    packvit.load(tmp_path / "a").save_pretrained(tmp_path / "b", layout="transformers")
    packvit.load(tmp_path / "b").save_pretrained(tmp_path / "c", layout="original")
    first, last = (load_file(tmp_path / side / "model.safetensors") for side in "ac")
    assert all(torch.equal(first[name], last[name]) for name in first | last)


@pytest.mark.parametrize("name", FAMILY.checkpoints)
def test_every_published_size_has_a_place_for_every_tensor(name: str):
    size = name.removeprefix("apple/aimv2-").split("-")[0]
    width, heads, inner = {
        "large": (1024, 8, 2816),
        "huge": (1536, 12, 4096),
        "1B": (2048, 16, 5632),
        "3B": (3072, 24, 8192),
    }[size]
    native = name.endswith("native")
    side = 224 if native else int(name.split("patch14-")[1].split("-")[0])
    config = Aimv2VisionConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=side,
        is_native=native,
        use_head=name.endswith("lit"),
    )
    with torch.device("meta"):
        theirs = Aimv2VisionModel(config).state_dict()
        layout = FAMILY.layout(theirs, {})
        ours = layout.read(config.to_dict(), theirs)
        encoder = AIMv2Packing(ours, FAMILY.images(ours))
    found = weights.store(encoder.state_dict(), layout.rules)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in theirs.items()}
    assert encoder.config.head_dim == 128
    if native:
        assert (encoder.config.positions, encoder.images.sizing) == (SinCos(), None)
    else:
        assert encoder.config.positions == Table(side // 14, side // 14, "bicubic_antialias")
        assert encoder.images.sizing == ShortestEdge(side, crop=(side, side))


def test_sixteen_checkpoints_are_published():
    assert len(set(FAMILY.checkpoints)) == 16


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_the_lit_image_tower_and_its_projection_equal_the_reference(tmp_path: Path, layout: str):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Aimv2Config(
        vision_config=reference.TINY | {"use_head": True},
        text_config=text | {"num_attention_heads": 2, "vocab_size": 50},
        projection_dim=24,
    )
    model: Any = Aimv2Model(config)
    reference.randomise(model)
    if layout == "transformers":
        model.save_pretrained(tmp_path)
    else:
        tower = reference.to_apple(dict(model.vision_model.state_dict()))
        tensors = {f"image_encoder.{name}": tensor for name, tensor in tower.items()}
        tensors["image_projector.weight"] = model.visual_projection.weight.detach()
        tensors["text_projector.weight"] = model.text_projection.weight.detach()
        tensors["text_encoder.trunk.post_trunk_norm.weight"] = torch.ones(32)
        tensors["log_logit_scale"] = model.logit_scale.detach()
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        save_file(tensors, tmp_path / "model.safetensors")
    encoder = packvit.load(tmp_path)
    patches = reference.draw_patches(OWN[:1], encoder.config.patch_dim)
    found = encoder.encode(patches, torch.tensor(OWN[:1]), projected=True)
    pixels = reference.image(patches, 5, 5, 14)
    with torch.no_grad():
        theirs = model.get_image_features(pixels)
    assert reference.scaled_difference(found.projected, theirs.pooler_output) <= LIMIT
    plain = reference.run(model.vision_model, patches, OWN[:1])
    assert reference.scaled_difference(found.pooled, plain.pooled) <= LIMIT


def test_another_grid_is_refused_unless_interpolation_is_asked_for():
    model = reference.aimv2()
    encoder = AIMv2Packing.from_transformers(model)
    for grid, said in [
        ((1, 4, 6), "4 x 6 patches,"),
        ((1, 1, 25), "same number of patches in another"),
    ]:
        patches = reference.draw_patches([(1, 5, 5), grid], encoder.config.patch_dim)
        with pytest.raises(ValueError, match=f"Image 1 .*{said}.* 5 x 5 alone.* 70 x 70 pixels"):
            encoder(patches, torch.tensor([(1, 5, 5), grid]))
    bent = AIMv2Packing.from_transformers(model, positions="interpolate")
    patches = reference.draw_patches([(1, 5, 5), (1, 4, 6)], encoder.config.patch_dim)
    alone = encoder(patches[:25], torch.tensor([(1, 5, 5)]))
    both = bent(patches, torch.tensor([(1, 5, 5), (1, 4, 6)]))
    assert reference.scaled_difference(both[:25], alone) <= LIMIT
    assert both.isfinite().all()


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match='is of model type "bert", which packvit does not run'
    ):
        packvit.load(tmp_path)
    with pytest.raises(CheckpointError, match='"bert", but AIMv2 is aimv2_vision_model or aimv2'):
        AIMv2Packing.from_pretrained(tmp_path)


def test_a_text_tower_alone_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "aimv2", "vision_config": {}}')
    save_file({"text_model.rms_norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no AIMv2 vision checkpoint: .* it holds 0: rms_norm"
    ):
        packvit.load(tmp_path)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_a_lost_a_strange_and_a_misshapen_tensor_are_all_named(tmp_path: Path, layout: str):
    write(tmp_path, reference.aimv2(**NATIVE), layout)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost, bent = {
        "transformers": (
            "encoder.layers.1.attention.k_proj.weight",
            "encoder.layers.2.ffn.up_proj.weight",
        ),
        "original": ("trunk.blocks.1.attn.qkv.weight", "trunk.blocks.2.mlp.fc3.weight"),
    }[layout]
    del tensors[lost]
    tensors[bent] = torch.zeros(96, 63)
    tensors["encoder.layers.1.attention.k_proj.extra"] = torch.zeros(2)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        packvit.load(tmp_path)
    problems = str(caught.value).splitlines()[1:]
    assert f"  missing: {lost}" in "\n".join(problems)
    assert f"  misshapen: {bent} is [96, 63], expected [96, 64]" in problems
    assert "  unexpected: encoder.layers.1.attention.k_proj.extra" in problems
    assert len(problems) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_bf16_on_the_gpu_is_as_close_to_fp32_as_the_references_own(backend: str):
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    model = reference.aimv2(**large, **NATIVE, num_hidden_layers=24).cuda()
    grid = [(1, 3, 17), (1, 16, 11), (1, 1, 5), (2, 9, 9), (1, 32, 24)]
    patches = reference.draw_patches(grid, 588).cuda()
    exact = reference.run(model, patches, grid)
    half = reference.run(model.bfloat16(), patches, grid)
    encoder = AIMv2Packing.from_transformers(model, attention=backend)
    found = encoder.encode(patches, torch.tensor(grid), taps=(11,))
    for ours, theirs, truth in (
        (found.tokens, half.tokens, exact.tokens),
        (found.pooled, half.pooled, exact.pooled),
        (found.taps[11], half.hidden_states[11], exact.hidden_states[11]),
    ):
        assert ours is not None
        assert theirs is not None
        assert truth is not None
        error, own = ((x.float() - truth).norm() for x in (ours, theirs))
        assert error <= 1.2 * own


@pytest.mark.gpu
def test_fp32_on_the_gpu_equals_the_reference():
    torch.backends.cuda.matmul.allow_tf32 = False
    model = reference.aimv2(**NATIVE).cuda()
    encoder = AIMv2Packing.from_transformers(model)
    patches = reference.draw_patches(ODD, 588).cuda()
    found = encoder.encode(patches, torch.tensor(ODD))
    assert judged.misses(found, model, patches, ODD) == []
