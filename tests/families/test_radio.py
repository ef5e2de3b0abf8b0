"""C-RADIO: what is its alone. Its outputs beside transformers' are in test_parity.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.families import radio_entries
from packvit.verification import VerifyOptions
from packvit.verification.verify import verify_checkpoint

GRID = [(1, 3, 17), (2, 4, 6), (1, 5, 5), (1, 19, 1)]


def saved(tmp_path: Path, **changes: Any) -> tuple[Path, Any]:
    model = reference.build("radio", **changes)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_the_summary_is_the_chosen_class_tokens_end_to_end(tmp_path: Path):
    folder, _ = saved(tmp_path, num_cls_tokens=3, summary_idxs=[2, 0])
    encoder = packvit.load(folder)
    found = encoder.encode(reference.draw_patches(GRID, encoder.config.patch_dim), GRID)
    assert found.prefix.shape == (5, 10, 64)
    assert found.pooled is not None
    assert torch.equal(found.pooled, torch.cat([found.prefix[:, 2], found.prefix[:, 0]], 1))


def test_one_vector_of_an_image_is_its_summary(tmp_path: Path):
    encoder = packvit.load(saved(tmp_path)[0])
    images = [Image.effect_noise((side, 42), 90).convert("RGB") for side in (28, 70)]
    pooled = encoder.encode(encoder.pack(images)).pooled
    assert pooled is not None
    np.testing.assert_allclose(encoder.embed(images), pooled.detach().numpy(), atol=1e-5)


def test_heads_for_teachers_are_reported_and_what_reads_videos_is_carried(tmp_path: Path):
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    video = "radio_model.model.patch_generator.video_embedder.weight"
    head = "radio_model.adaptors.siglip2-g.head_mlp.fc1.weight"
    more = {video: torch.rand(64, 1176), head: torch.ones(2)}
    rewrite(folder, tensors | more)
    encoder = packvit.load(folder)
    assert encoder.skipped == (head,)
    encoder.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == {*tensors, video}
    assert all(torch.equal(after[name], (tensors | more)[name]) for name in after)


def test_published_checkpoints_have_no_scales(tmp_path: Path):
    folder, model = saved(tmp_path)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.data.fill_(1)
    tensors = load_file(folder / "model.safetensors")
    least = {name: tensor for name, tensor in tensors.items() if "layer_scale" not in name}
    rewrite(folder, least)
    encoder = packvit.load(folder)
    assert not encoder.config.layer_scale
    patches = reference.draw_patches(GRID, encoder.config.patch_dim)
    ours, theirs = encoder(patches, GRID), reference.run(model, patches, GRID).tokens
    assert (ours - theirs).abs().max() < 1e-4
    encoder.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == least.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary_idxs": [0, 3]}, "none of 3 class tokens"),
        ({"summary_idxs": []}, "none of 3 class tokens"),
        ({"norm_mean": [0.5, 0.5, 0.5]}, "norm_mean.*packvit knows CLIP's"),
    ],
)
def test_a_configuration_of_no_published_model_is_refused(changes: dict[str, Any], message: str):
    layout = packvit.RadioPacking.family.layouts[0]
    with pytest.raises(CheckpointError, match=message):
        layout.read(changes, ())


def test_the_width_of_every_mlp_survives():
    layout = packvit.RadioPacking.family.layouts[0]
    ratios = {1152: (4304 / 1152, 3.7362), 768: (4.0,), 1536: (8960 / 1536,)}
    for width, ratio in ((width, ratio) for width, some in ratios.items() for ratio in some):
        config = layout.read({"hidden_size": width, "mlp_ratio": ratio}, ())
        assert config.mlp_width == int(width * ratio)
        assert layout.read(layout.write(config), ()) == config


def test_pixels_are_those_of_the_processor_normalised_by_the_model(tmp_path: Path):
    folder, model = saved(tmp_path)
    settings = {"do_normalize": False, "do_center_crop": False, "size": {"height": 56, "width": 70}}
    processor = CLIPImageProcessorPil(**settings)
    processor.save_pretrained(folder)
    encoder = packvit.load(folder)
    noise = np.random.default_rng(0).integers(0, 256, (61, 87, 3), np.uint8)
    pack = encoder.pack([noise])
    ours = reference.image(encoder.to_values(pack.hidden_states), 4, 5, 14)
    theirs = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, model.input_conditioner(theirs))


def test_a_processor_that_normalises_is_refused(tmp_path: Path):
    folder, _ = saved(tmp_path)
    CLIPImageProcessorPil().save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"do_normalize True.*Set it to false"):
        packvit.load(folder)


def test_swiglu_is_read_by_transformers_older_names_too(tmp_path: Path):
    folder, model = saved(tmp_path, use_swiglu_ffn=True)
    encoder = packvit.load(folder)
    patches = reference.draw_patches(GRID, encoder.config.patch_dim)
    before = encoder(patches, GRID)
    assert (before - reference.run(model, patches, GRID).tokens).abs().max() < 1e-4
    tensors = load_file(folder / "model.safetensors")
    for gate in [name for name in tensors if "mlp.gate_proj" in name]:  # none before 5.24
        both = [tensors.pop(gate), tensors.pop(gate.replace("gate_proj", "up_proj"))]
        tensors[gate.replace("gate_proj", "weights_in")] = torch.cat(both)
        down = gate.replace("gate_proj", "down_proj")
        tensors[down.replace("down_proj", "weights_out")] = tensors.pop(down)
    rewrite(folder, tensors)
    assert torch.equal(packvit.load(folder)(patches, GRID), before)


@pytest.mark.parametrize("name", ["norm_mean", "norm_std"])
def test_statistics_in_the_tensors_are_clips_or_refused(tmp_path: Path, name: str):
    """The authors' code reads them from there, whatever config.json says."""
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    full = f"radio_model.input_conditioner.{name}"
    rewrite(folder, tensors | {full: tensors[full].bfloat16()})
    packvit.load(folder)
    other = {"norm_mean": [0.485, 0.456, 0.406], "norm_std": [0.229, 0.224, 0.225]}[name]
    rewrite(folder, tensors | {full: torch.tensor(other).view(3, 1, 1)})
    with pytest.raises(CheckpointError, match=rf"{name} holds \[0.*packvit knows \[0\.\d"):
        packvit.load(folder)


TEACHERS = [{"name": "a"}, {"name": "b", "use_summary": True}, {"name": "c", "use_summary": False}]


def published(name: str, **changes: Any) -> dict[str, Any]:
    """Return config.json as the authors write it, as far as it is about the model."""
    args = {
        "model": name,
        "cls_token_per_teacher": True,
        "cpe_max_size": 2048,
        "cpe_num_registers": None,
        "model_kwargs": {},
        "register_multiple": 10,
        "teachers": TEACHERS,
    }
    return {
        "architectures": ["RADIOModel"],
        "auto_map": {"AutoModel": "hf_model.RADIOModel"},
        "adaptor_names": ["a"],
        "args": args | changes,
        "max_resolution": 2048,
        "patch_size": 16,
        "preferred_resolution": [512, 512],
        "version": "c-radio_v4-h",
    }


def test_the_authors_configuration_is_that_of_transformers():
    layout = packvit.RadioPacking.family.layouts[0]
    theirs = transformers.RadioConfig().to_dict()
    assert layout.read(published("vit_huge_patch16_224"), ()) == layout.read(theirs, ())
    seven = published("vit_huge_patch16_224", register_multiple=None, cpe_num_registers=7)
    assert layout.read(seven, ()) == layout.read(theirs, ())
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    assert layout.read(published("vit_large_patch16_224"), ()) == layout.read(theirs | large, ())


def test_a_checkpoint_with_the_authors_configuration_is_read_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its tensors have the same names; the size is a small one."""
    monkeypatch.setitem(radio_entries.ARCHITECTURES, "vit_base_patch16_224", (64, 3, 4, 96))
    folder, _ = saved(
        *(tmp_path,),
        **{"num_cls_tokens": 3, "num_registers": 7, "summary_idxs": [0, 1], "patch_size": 16},
        **{"max_img_size": 80},
    )
    native = packvit.load(folder)
    config = published("vit_base_patch16_224", cpe_max_size=80)
    (folder / "config.json").write_text(json.dumps(config))
    encoder = packvit.load(folder)
    assert encoder.config == native.config
    patches = reference.draw_patches(GRID, encoder.config.patch_dim)
    assert torch.equal(encoder(patches, GRID), native(patches, GRID))
    found = verify_checkpoint(folder, VerifyOptions(quick=True, lower=()), device="cpu")
    assert found.missed == ()
    assert found.reference == "RadioModel"
    encoder.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["model_type"], written["hidden_size"]) == ("radio", 64)
    kind: Any = transformers.RadioModel
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert again.config.num_registers == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "dino_v2_g_student"},
        {"model_norm": True},
        {"model_kwargs": {"scaled_ln": True}},
        {"teachers": [{"name": "a"}, {"name": "a"}]},
        {"cpe_max_size": 224},
    ],
)
def test_what_no_published_vit_has_is_refused(changes: dict[str, Any]):
    layout = packvit.RadioPacking.family.layouts[0]
    with pytest.raises(CheckpointError, match=r"knows vit_base_patch16_224|none of 1 class"):
        layout.read(published("vit_base_patch16_224", **changes), ())

    normed = published("vit_base_patch16_224") | {"feature_normalizer_config": {"embed_dim": 768}}
    with pytest.raises(CheckpointError, match="feature_normalizer_config"):
        layout.read(normed, ())
