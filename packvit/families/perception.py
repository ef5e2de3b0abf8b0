"""Perception Encoder, core, lang and spatial, as timm publishes it: a table and rotary positions.

A config.json of timm's names an architecture, and what of it is otherwise. Core pools and projects
into the space of its text tower; lang and spatial end without a norm. The angles of a checkpoint
turn neighbours, columns first, and count from 1 where there is a class token.

Source: "Perception Encoder", arXiv:2504.13181; timm 1.0.31, models/eva.py. The authors' code
resizes the table to other grids, bilinearly; timm refuses them unless it is asked.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, entry, square
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import convolution, fuse, layers, neighbours, rename, reshape
from packvit.config import (
    HALF_STATISTICS,
    AxialRotary,
    EncoderConfig,
    ImageConfig,
    Probe,
    ShortestEdge,
    Table,
)
from packvit.encoder import Encoder
from packvit.families.perception_sizes import (
    ARCHITECTURES,
    IMAGES,
    architecture_of,
    arguments_in,
    arguments_of,
)

OURS, BLOCK = "encoder.layers.{i}.", "blocks.{i}."
LAYERS = {
    "attention_norm": "norm1",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
POOL = {"out": "proj", "norm": "norm", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
RULES = (
    *convolution("embeddings.patches", "patch_embed.proj"),
    reshape("embeddings.positions", "pos_embed", 1),
    reshape("embeddings.class_token", "cls_token", 1, 1),
    *layers("", "", {"embeddings.norm": "norm_pre", "norm": "norm", "projection": "head"}),
    *layers(OURS, BLOCK, LAYERS),
    *neighbours(f"{OURS}attention.qkv", f"{BLOCK}attn.qkv"),
    rename(f"{OURS}attention_scale.scale", f"{BLOCK}gamma_1"),
    rename(f"{OURS}mlp_scale.scale", f"{BLOCK}gamma_2"),
    reshape("head.probe", "attn_pool.latent", 1, 1),
    *layers("head.", "attn_pool.", POOL),
    *(
        fuse(f"head.qkv.{part}", f"attn_pool.q.{part}", f"attn_pool.kv.{part}", shares=(1, 2))
        for part in ("weight", "bias")
    ),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read timm's config.json.

    Raises: CheckpointError for arguments or preprocessing that no published checkpoint has.
    """
    made = arguments_in(config)
    patch, width = square(made, "patch_size"), entry(made, "embed_dim", int)
    side, pooled = square(made, "img_size") // patch, made["global_pool"]
    probe = Probe(
        entry(made, "attn_pool_num_heads", int),
        int(width * entry(made, "attn_pool_mlp_ratio", (int, float))),
    )
    offset = int(entry(made, "rope_grid_offset", float))
    return EncoderConfig(
        width=width,
        layers=entry(made, "depth", int),
        heads=entry(made, "num_heads", int),
        mlp_width=int(width * entry(made, "mlp_ratio", (int, float))),
        patch=patch,
        positions=Table(side, side, "bilinear", class_row=entry(made, "class_token", bool)),
        rotary=AxialRotary(10000.0, "column_row", offset=offset),
        patch_bias=False,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        layer_scale=made["init_values"] is not None,
        class_token=entry(made, "class_token", bool),
        embedding_norm="tokens",
        final_norm="tokens" if pooled == "map" else None,
        pool="probe" if pooled == "map" else None,
        probe=probe if pooled == "map" else None,
        projection=entry(config, "num_classes", int, 0) or None,
        projection_bias=True,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write timm's config.json: an architecture, and what of it is otherwise."""
    made = arguments_of(config)
    name = architecture_of(made)
    other = {key: value for key, value in made.items() if ARCHITECTURES[name][key] != value}
    shared = {"num_classes": config.projection or 0}
    size = {"input_size": [3, *[made["img_size"]] * 2], "fixed_input_size": True}
    return {
        "architecture": name,
        "num_features": config.width,
        "global_pool": made["global_pool"],
        **shared,
        **({"model_args": other} if other else {}),
        "pretrained_cfg": IMAGES | size | shared,
    }


def images(config: EncoderConfig) -> ImageConfig:
    """Return timm's preprocessing: the shorter side to the size, then the middle."""
    table = config.positions
    assert isinstance(table, Table)
    side = table.rows * config.patch
    sizing = ShortestEdge(side, (side, side), "even")
    return ImageConfig(config.patch, *HALF_STATISTICS, "bicubic", sizing)


FAMILY = Family(
    name="Perception Encoder",
    model_types=tuple(ARCHITECTURES),
    layouts=(Layout("transformers", "norm_pre.weight", RULES, read, write),),
    images=images,
    checkpoints=tuple(f"timm/{name}.fb" for name in ARCHITECTURES),
    reference=Reference(
        variants=(
            Variant("core", "vit_pe_core_tiny_patch16_384"),
            Variant("lang", "vit_pe_lang_large_patch14_448"),
            Variant("spatial, no class token", "vit_pe_spatial_gigantic_patch14_448"),
        ),
        processor="",
        library="timm",
    ),
)


class PerceptionPacking(Encoder):
    """Perception Encoder on packs: `timm/vit_pe_*`."""

    family = FAMILY
