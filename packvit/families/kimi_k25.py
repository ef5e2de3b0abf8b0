"""MoonViT, the vision tower of Kimi K2.5 and K2.6: clips attend as a whole.

A table is resized and added, rotary positions turn queries and keys, and a sine-cosine tells the
frames of a clip apart. A checkpoint is the whole model under its published names ("original"), or
the tower as transformers saves it ("transformers"), without the projector that merges.

Source: transformers 5.17, models/kimi_k25 and, for the published names, conversion_mapping.py.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints import config_json
from packvit.checkpoints.config_json import Json, activation, entry, sizes, square
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import convolution, layers, neighbours, prefixed, square_table
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
OLD = "vision_tower.encoder."
SIDE = 2  # of the squares that the projector merges
PROJECTOR = {"norm": "pre_norm", "up": "proj.0", "down": "proj.2"}
OLD_RULES = (
    *prefixed(RULES[:2], "vision_tower."),
    square_table("embeddings.positions", "vision_tower.patch_embed.pos_emb.weight"),
    *layers("encoder.layers.{i}.", f"{OLD}blocks.{{i}}.", OLD_BLOCK),
    *neighbours("encoder.layers.{i}.attention.qkv", f"{OLD}blocks.{{i}}.wqkv"),
    *layers("", OLD, {"norm": "final_layernorm"}),
    *layers("merger.last.", "mm_projector.", PROJECTOR),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's.

    Raises: CheckpointError for a table that is no square, or a merger of another side.
    """
    inner = config_json.tower(config)
    side, width = (entry(inner, f"pos_emb_{name}", int, 64) for name in ("height", "width"))
    merged = square(inner, "merge_kernel_size", SIDE)
    if side != width or merged != SIDE:
        raise CheckpointError(
            f'config.json says "pos_emb_height": {side}, "pos_emb_width": {width} and '
            f'"merge_kernel_size": {merged}; packvit knows square tables, and {SIDE}.'
        )
    merger = None
    if "mm_projector.proj.0.weight" in names:
        text = entry(config, "text_config", dict)
        eps = entry(config, "projection_layer_norm_eps", float, 1e-5)
        merger = Merger(entry(text, "hidden_size", int), "layer", eps, SIDE)
    frames = entry(inner, "pos_emb_time", int, 4)
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


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Kimi_K25VisionConfig."""
    table, rotary = config.positions, config.rotary
    assert isinstance(table, Table)
    assert isinstance(rotary, AxialRotary)
    sizes = config_json.write_sizes(config)
    del sizes["num_channels"]  # of which its class knows nothing
    return sizes | {
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


def images(config: EncoderConfig) -> ImageConfig:
    """Return K2.5's preprocessing: never larger, filled up with black to whole squares."""
    return ImageConfig(config.patch, *HALF_STATISTICS, "bicubic", PaddedPatches(), SIDE)


ALONE = Layout("transformers", "final_layernorm.weight", RULES, read, write)
MARKER = f"{OLD}final_layernorm.weight"
WHOLE = Layout("original", MARKER, OLD_RULES, read, write_whole, skipped=("language_model",))

FAMILY = Family(
    name="MoonViT",
    model_types=("kimi_k25", "kimi_k25_vision"),
    layouts=(ALONE, WHOLE),
    images=images,
    checkpoints=("moonshotai/Kimi-K2.5", "moonshotai/Kimi-K2.6"),
    reference=Reference(
        variants=(
            Variant("clips", "Kimi_K25VisionModel", {"pos_emb_height": 14, "pos_emb_width": 14}),
        ),
        processor="Kimi_K25ImageProcessor",
        processor_options={"patch_size": 16},  # of the small model above
    ),
)


class KimiK25VisionPacking(Encoder):
    """MoonViT on packs: the vision tower of `moonshotai/Kimi-K2.*`."""

    family = FAMILY
