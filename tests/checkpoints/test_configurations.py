"""What transformers reads in a config.json that we wrote: all that it read in the one we read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2WithRegistersModel

import packvit
from packvit.checkpoints.layouts import Variant
from packvit.families import FAMILIES
from packvit.verification.references import TEXT_SIZES, model_class, quiet, randomise

VARIANTS = {
    f"{encoder.family.name}, {variant.name}": variant
    for encoder in FAMILIES
    for variant in encoder.family.reference.variants
    if encoder.family.reference.library == "transformers"
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
SIZES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_size", "embed_dim"), (16, 32, 48)),
    **dict.fromkeys(("num_hidden_layers", "depth"), (2, 3)),
    **dict.fromkeys(("num_attention_heads", "num_heads"), (2, 4)),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (1e-5, 1e-6, 3e-7)),
    "intermediate_size": (24, 40),
    "mlp_ratio": (1, 2, 3),
    "patch_size": (4, 7),
    "max_img_size": (21, 32),
    "num_cls_tokens": (3, 4),
    "num_registers": (1, 7),
    "summary_idxs": ([0, 1], [2, 0, 1], [1]),
    "image_size": (21, 28, 30, 32),  # of which patches leave pixels over
    "num_patches": (4, 9),
    "num_position_embeddings": (9, 16),
    "num_register_tokens": (0, 1, 4),
    "projection_dim": (8, 32),
    "out_hidden_size": (24, 40),
    "window_size": (16, 28),
    "fullatt_block_indexes": ([0], [1], []),
    "deepstack_visual_indexes": ([0], [1, 0]),
    "hidden_act": ACTIVATIONS,
    "rope_theta": (50.0, 100.0),
}
LEFT = {  # what we know one answer of, and what says how a model was run
    *("num_channels", "in_channels", "in_chans", "temporal_patch_size", "spatial_merge_size"),
    *("model_type", "architectures", "output_hidden_states", "output_attentions", "return_dict"),
    *("is_encoder_decoder", "dtype", "use_mask_token", "query_bias", "key_bias", "value_bias"),
    *("is_native", "use_head", "use_swiglu_ffn", "vision_use_head", "use_gated_mlp"),
}
ABOUT_FILES = {"dtype", "architectures", "_name_or_path", "transformers_version"}
BIASES = ("proj_bias", "mlp_bias", "qkv_bias")  # where a family has several, they agree


def draw_entries(kind: Any, variant: Variant, draw: np.random.Generator) -> dict[str, Any]:
    """Draw every entry that the class of a configuration knows, by the kind of its default."""
    known = kind().to_dict()
    drawn: dict[str, Any] = {}
    bias = bool(draw.integers(2))
    for name, default in known.items():
        if name in SIZES:
            choices = SIZES[name]
            chosen = choices[int(draw.integers(len(choices)))]
            drawn[name] = float(chosen) if type(default) is float else chosen
        elif name in BIASES:
            drawn[name] = bias
        elif name in LEFT:
            continue
        elif isinstance(default, bool):
            drawn[name] = bool(draw.integers(2))
        elif isinstance(default, float):
            drawn[name] = round(float(draw.uniform(0, 0.5)), 3)
    if "rope_parameters" in known:
        drawn["rope_parameters"] = {
            "rope_type": "axial",
            "rope_theta": float(draw.choice((1e3, 1e4))),
        }
    return {**variant.entries, **drawn}


def draw_model(variant: Variant, draw: np.random.Generator) -> Any:
    kind = model_class(variant.model)
    settings = kind.config_class
    inner = getattr(settings, "sub_configs", {}).get("vision_config")
    entries = draw_entries(inner or settings, variant, draw)
    if inner:
        text = {**TEXT_SIZES, "projection_dim": 8}
        config = settings(vision_config={**entries, "projection_dim": 8}, text_config=text)
        config.projection_dim = 8
    else:
        config = settings(**entries)
    return randomise(kind(config), seed=0)


def read(folder: Path, config: Any) -> dict[str, Any]:
    """What the class of a configuration reads in a folder, of the vision tower alone."""
    kind = getattr(config, "sub_configs", {}).get("vision_config", type(config))
    found = kind.from_pretrained(folder).to_dict()
    return {name: value for name, value in found.items() if name not in ABOUT_FILES}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_trip_keeps_every_entry_that_transformers_reads(tmp_path: Path, name: str):
    """Of a checkpoint in a folder, and of a model in memory, whose names change: row P2."""
    variant = VARIANTS[name]
    for seed in range(2):
        model = draw_model(variant, np.random.default_rng(seed))
        there = tmp_path / f"{seed} there"
        with quiet():
            model.save_pretrained(there)
        loaded = packvit.load(there, device="cpu")
        taken = type(loaded).from_transformers(model)
        for place, encoder in (("folder", loaded), ("memory", taken)):
            back = tmp_path / f"{seed} {place}"
            encoder.save_pretrained(back)
            assert read(back, model.config) == read(there, model.config)
            assert packvit.load(back, device="cpu").config == encoder.config
            before, after = (load_file(x / "model.safetensors") for x in (there, back))
            ours = {n.removeprefix("vision_model."): x for n, x in after.items()}
            left = set(encoder.skipped)
            theirs = {
                n.removeprefix("vision_model."): x for n, x in before.items() if n not in left
            }
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_was_changed_since_it_was_read_is_written(tmp_path: Path):
    model = draw_model(VARIANTS["DINOv2, plain"], np.random.default_rng(0))
    model.save_pretrained(tmp_path / "there")
    encoder = packvit.load(tmp_path / "there", device="cpu")
    encoder.config = replace(encoder.config, norm_eps=1e-3)
    encoder.save_pretrained(tmp_path / "back")
    there, back = (read(tmp_path / side, model.config) for side in ("there", "back"))
    assert back == there | {"layer_norm_eps": 1e-3}
    assert there["image_size"] % there["patch_size"]


def test_a_leftover_width_of_the_projection_does_not_outlive_the_one_that_counts(tmp_path: Path):
    """Published CLIPs say one in the part about images, and another beside it, which is right."""
    model = draw_model(VARIANTS["CLIP, two towers"], np.random.default_rng(0))
    model.save_pretrained(tmp_path / "there")
    path = tmp_path / "there" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["projection_dim"] = 99
    path.write_text(json.dumps(config))
    packvit.load(tmp_path / "there", device="cpu").save_pretrained(tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["projection_dim"] == config["projection_dim"]


def test_a_model_made_for_registers_that_has_none_stays_one(tmp_path: Path):
    """Its positions are antialiased, which those of a model without registers are not."""
    kind: Any = Dinov2WithRegistersModel
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 30}
    kind(kind.config_class(**sizes, num_register_tokens=0)).save_pretrained(tmp_path / "there")
    encoder = packvit.load(tmp_path / "there", device="cpu")
    encoder.save_pretrained(tmp_path / "back")
    back, read = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(read.values())
    assert back.config.num_register_tokens == 0
    assert packvit.load(tmp_path / "back", device="cpu").config == encoder.config
