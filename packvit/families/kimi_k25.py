"""MoonViT, the vision tower of Kimi K2.5 and K2.6, and of Kimi-VL: clips attend as a whole.

A table is resized and added, rotary positions turn queries and keys, and a sine-cosine tells the
frames of a clip apart; Kimi-VL's takes images alone, which to K2.5's are clips of one frame. A
checkpoint is the whole model under its published names ("original"), or the tower as transformers
saves it ("transformers"), without the projector that merges.

Source: transformers 5.17, models/kimi_k25 and, for the published names, conversion_mapping.py; for
Kimi-VL's names vllm of 2026-11, models/moonvit.py and kimi_vl.py.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from packvit.checkpoints import config_json
from packvit.checkpoints.config_json import Json, activation, entry, sizes, square
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import Rule, convolution, layers, neighbours, prefixed, square_table
from packvit.config import (
    HALF_STATISTICS,
    AxialRotary,
    EncoderConfig,
    ImageConfig,
    Merger,
    PaddedPatches,
    Table,
)
from packvit.encoder import Encoder

BLOCK = {  # as transformers names a block's layers
    "attention_norm": "norm1",
    "attention.qkv": "attn.q_proj attn.k_proj attn.v_proj",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
OLD_BLOCK = {  # and as they are published, but for q, k and v
    "attention_norm": "norm0",
    "attention.out": "wo",
    "mlp_norm": "norm1",
    "mlp.up": "mlp.fc0",
    "mlp.down": "mlp.fc1",
}
RULES = (
    *convolution("embeddings.patches", "patch_embed.proj"),
    square_table("embeddings.positions", "patch_embed.pos_emb.position_embeddings"),
    *layers("encoder.layers.{i}.", "layers.{i}.", BLOCK),
    *layers("", "", {"norm": "final_layernorm"}),
)
SIDE = 2  # of the squares that the projector merges
PROJECTORS = {  # by what their names begin with: K2.5's and Kimi-VL's
    "mm_projector.": {"norm": "pre_norm", "up": "proj.0", "down": "proj.2"},
    "multi_modal_projector.": {"norm": "pre_norm", "up": "linear_1", "down": "linear_2"},
}
OLD_RULES = (
    *RULES[:2],
    square_table("embeddings.positions", "patch_embed.pos_emb.weight"),
    *layers("encoder.layers.{i}.", "encoder.blocks.{i}.", OLD_BLOCK),
    *neighbours("encoder.layers.{i}.attention.qkv", "encoder.blocks.{i}.wqkv"),
    *layers("", "encoder.", {"norm": "final_layernorm"}),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's.

    Raises: CheckpointError for a table that is no square, or a merger of another side.
    """
    inner = config_json.tower(config)
    alone = inner.get("model_type") == "moonvit"  # of images alone: Kimi-VL's
    word = "init_pos_emb_" if alone else "pos_emb_"
    side, width = (entry(inner, f"{word}{name}", int, 64) for name in ("height", "width"))
    merged = square(inner, "merge_kernel_size", SIDE)
    if side != width or merged != SIDE:
        raise CheckpointError(
            f'config.json says "{word}height": {side}, "{word}width": {width} and '
            f'"merge_kernel_size": {merged}; packvit knows square tables, and {SIDE}.'
        )
    merger = None
    if any(f"{prefix}pre_norm.weight" in names for prefix in PROJECTORS):
        text = entry(config, "text_config", dict)
        eps = entry(config, "projection_layer_norm_eps", float, 1e-5)
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


def takes_images(config: EncoderConfig) -> bool:
    """Return whether a tower takes images alone, as Kimi-VL's does."""
    return isinstance(config.positions, Table) and config.positions.frames == 1


def takes_clips(config: EncoderConfig) -> bool:
    """Return whether a tower takes clips."""
    return not takes_images(config)


def images(config: EncoderConfig) -> ImageConfig:
    """Return K2.5's preprocessing: never larger, filled up with black to whole squares."""
    sizing = PaddedPatches(4096) if takes_images(config) else PaddedPatches()
    return ImageConfig(config.patch, *HALF_STATISTICS, "bicubic", sizing, multiple=SIDE)


def whole(projector: str) -> tuple[Rule, ...]:
    """Return the rules of a whole model, by what its projector's names begin with."""
    merger = layers("merger.last.", projector, PROJECTORS[projector])
    return (*prefixed(OLD_RULES, "vision_tower."), *merger)


ALONE = Layout("transformers", "final_layernorm.weight", RULES, read, write)
K25, VL = (
    Layout("original", f"{projector}pre_norm.weight", whole(projector), read, write_whole)
    for projector in PROJECTORS
)
LAYOUTS = (
    ALONE,
    replace(K25, skipped=("language_model",), takes=takes_clips),
    Layout(
        *("original", "encoder.final_layernorm.weight", OLD_RULES, read, write_images_alone),
        takes=takes_images,
    ),
    replace(VL, write=write_images_alone, skipped=("language_model",), takes=takes_images),
)

FAMILY = Family(
    name="MoonViT",
    model_types=("kimi_k25", "kimi_k25_vision", "kimi_vl", "moonvit"),
    layouts=LAYOUTS,
    images=images,
    checkpoints=(
        *("moonshotai/Kimi-K2.5", "moonshotai/Kimi-K2.6"),
        *("moonshotai/Kimi-VL-A3B-Instruct", "moonshotai/Kimi-VL-A3B-Thinking-2506"),
        "moonshotai/MoonViT-SO-400M",
    ),
    reference=Reference(
        variants=(
            Variant("clips", "Kimi_K25VisionModel", {"pos_emb_height": 14, "pos_emb_width": 14}),
        ),
        processor="Kimi_K25ImageProcessor",
        processor_options={"patch_size": 16},  # of the small model above
    ),
)


class KimiK25VisionPacking(Encoder):
    """MoonViT on packs: the vision tower of `moonshotai/Kimi-K2.*` and `Kimi-VL-*`."""

    family = FAMILY
