"""MoonViT's config.json, in the words of transformers, of K2.5 as published, and of Kimi-VL.

Source: transformers 5.17, models/kimi_k25; for the published words sglang 0.5.9,
configs/kimi_k25.py and configs/kimi_vl_moonvit.py.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints import config_json
from packvit.checkpoints.config_json import Json, activation, entry, sizes, square
from packvit.checkpoints.errors import CheckpointError
from packvit.config import AxialRotary, EncoderConfig, Merger, Table

SIDE = 2  # of the squares that the projector merges
PROJECTORS = {  # by what their names begin with: K2.5's and Kimi-VL's
    "mm_projector.": {"norm": "pre_norm", "up": "proj.0", "down": "proj.2"},
    "multi_modal_projector.": {"norm": "pre_norm", "up": "linear_1", "down": "linear_2"},
}
PUBLISHED = {  # K2.5's words for transformers', and Kimi-VL's for the table
    "vt_hidden_size": "hidden_size",
    "vt_num_hidden_layers": "num_hidden_layers",
    "vt_num_attention_heads": "num_attention_heads",
    "vt_intermediate_size": "intermediate_size",
    "init_pos_emb_height": "pos_emb_height",
    "init_pos_emb_width": "pos_emb_width",
    "init_pos_emb_time": "pos_emb_time",
}
KINDS = {  # of K2.5's, each the only one that is published
    "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
}


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's.

    Raises: CheckpointError for a table that is no square, or a merger of another side.
    """
    inner = config_json.tower(config)
    alone = inner.get("model_type") == "moonvit"  # of images alone: Kimi-VL's
    others = {key: inner[key] for key, kind in KINDS.items() if inner.get(key, kind) != kind}
    if others:
        raise CheckpointError(f"config.json says {others}; packvit knows {KINDS}.")
    inner = {**inner, **{PUBLISHED[key]: inner[key] for key in PUBLISHED.keys() & inner.keys()}}
    side, width = (entry(inner, f"pos_emb_{name}", int, 64) for name in ("height", "width"))
    merged = square(inner, "merge_kernel_size", SIDE)
    if side != width or merged != SIDE:
        raise CheckpointError(
            f"config.json says a table of {side} x {width} positions and "
            f'"merge_kernel_size": {merged}; packvit knows square tables, and {SIDE}.'
        )
    merger = None
    if any(f"{prefix}pre_norm.weight" in names for prefix in PROJECTORS):
        text = entry(config, "text_config", dict)
        eps = entry(inner, "projector_ln_eps", float, 1e-5)
        eps = entry(config, "projection_layer_norm_eps", float, eps)
        merger = Merger(entry(text, "hidden_size", int), "layer", eps, SIDE)
    frames = 1 if alone else entry(inner, "pos_emb_time", int, 4)
    return EncoderConfig(
        **sizes(inner, width=1152, layers=27, heads=16, mlp_width=4304),
        patch=square(inner, "patch_size", 14),
        positions=Table(side, side, "bicubic", any_grid=True, frames=frames),
        rotary=AxialRotary(config_json.axial_base(inner), "column_row", "interleaved"),
        norm="layer",
        norm_eps=1e-5,  # config.json says nothing about it
        activation=activation(inner, "gelu_pytorch_tanh"),
        segments="clip",
        merger=merger,
    )


def write_sizes(config: EncoderConfig) -> dict[str, Any]:
    """Return the sizes; transformers' class knows nothing of channels."""
    written = config_json.write_sizes(config)
    return {key: size for key, size in written.items() if key != "num_channels"}


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Kimi_K25VisionConfig."""
    table, rotary = config.positions, config.rotary
    assert isinstance(table, Table)
    assert isinstance(rotary, AxialRotary)
    return write_sizes(config) | {
        "model_type": "kimi_k25_vision",
        "architectures": ["Kimi_K25VisionModel"],
        "merge_kernel_size": [SIDE, SIDE],
        "pos_emb_height": table.rows,
        "pos_emb_width": table.columns,
        "pos_emb_time": table.frames,
        "rope_parameters": {"rope_type": "axial", "rope_theta": rotary.base},
    }


def write_whole(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json of the whole model, as far as it is about the tower and its projector."""
    merger = config.merger
    projector = merger and {
        "projection_hidden_size": config.width,
        "projection_layer_norm_eps": merger.norm_eps,
        "text_config": {"hidden_size": merger.width},
    }
    return {"model_type": "kimi_k25", "vision_config": write(config), **(projector or {})}


def write_images_alone(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json of Kimi-VL, as far as it is about the tower and its projector."""
    table, merger = config.positions, config.merger
    assert isinstance(table, Table)
    tower = write_sizes(config) | {
        "model_type": "moonvit",
        "merge_kernel_size": [SIDE, SIDE],
        "init_pos_emb_height": table.rows,
        "init_pos_emb_width": table.columns,
    }
    text = {"text_config": {"hidden_size": merger.width}} if merger else {}
    return {"model_type": "kimi_vl", "vision_config": tower, **text} if merger else tower
