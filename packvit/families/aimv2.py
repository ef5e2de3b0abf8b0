"""AIMv2: `apple/aimv2-*`, with positions for any grid ("native") or learned for one.

Two layouts are in circulation. Apple published "original", with q, k and v in one matrix; the
transformers library rewrote the same weights as "transformers", with each on its own. The LiT
checkpoint wraps either beside a text tower, which is skipped.

Source: "Multimodal Autoregressive Pre-training of Large Vision Encoders", arXiv:2411.14402;
transformers 5.17, models/aimv2.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from packvit.config import (
    CLIP_MEAN,
    CLIP_STD,
    EncoderConfig,
    ImageConfig,
    ShortestEdge,
    SinCos,
    Table,
)
from packvit.encoder import Encoder
from packvit.family import (
    Family,
    Json,
    Layout,
    activation,
    agreed,
    field,
    sizes,
    square,
    write_sizes,
)
from packvit.layers import Attention, Block, Blocks, PatchEmbeddings
from packvit.weights import Rule, conv_to_linear, layers, prefixed, rename, reshape

SIZES = ("large", "huge", "1B", "3B")
VARIANTS = ("native", "224-distilled", "336-distilled", "224-lit")

ORIGINAL_RULES = (
    conv_to_linear("embeddings.patches.weight", "preprocessor.patchifier.proj.weight"),
    rename("embeddings.patches.bias", "preprocessor.patchifier.proj.bias"),
    rename("embeddings.norm.weight", "preprocessor.patchifier.norm.weight"),
    reshape("embeddings.positions", "preprocessor.pos_embed", 1),
    *layers(
        "encoder.layers.{i}.",
        "trunk.blocks.{i}.",
        {
            "attention_norm": "norm_1",
            "attention.qkv": "attn.qkv",
            "attention.out": "attn.proj",
            "mlp_norm": "norm_2",
            "mlp.gate_up": "mlp.fc1 mlp.fc3",
            "mlp.down": "mlp.fc2",
        },
    ),
    rename("norm.weight", "trunk.post_trunk_norm.weight"),
    reshape("head.query", "head.cls_token", 1, 1),
    *layers("head.", "head.", {"kv": "k v", "out": "linear"}),
)

TRANSFORMERS_RULES = (
    conv_to_linear("embeddings.patches.weight", "embeddings.patch_embed.weight"),
    rename("embeddings.patches.bias", "embeddings.patch_embed.bias"),
    rename("embeddings.norm.weight", "embeddings.rms_norm.weight"),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
    *layers(
        "encoder.layers.{i}.",
        "encoder.layers.{i}.",
        {
            "attention_norm": "rms_norm1",
            "attention.qkv": "attention.q_proj attention.k_proj attention.v_proj",
            "attention.out": "attention.out_proj",
            "mlp_norm": "rms_norm2",
            "mlp.gate_up": "ffn.gate_proj ffn.up_proj",
            "mlp.down": "ffn.down_proj",
        },
    ),
    rename("norm.weight", "rms_norm.weight"),
    reshape("head.query", "head.cls_token", 1, 1),
    *layers("head.", "head.", {"kv": "k_proj v_proj", "out": "output_proj"}),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of either layout.

    Apple's native variant says so by having no image_size, and no entry tells of its head.
    """
    rewritten = config.get("model_type") == "aimv2_vision_model"
    native = field(config, "is_native", bool, not rewritten and "image_size" not in config)
    head = field(config, "use_head", bool, rewritten or "head.cls_token" in names)
    patch = square(config, "patch_size", 14)
    side = 0 if native else square(config, "image_size", 224) // patch
    bias = agreed(config, "qkv_bias", "mlp_bias", "use_bias")
    return EncoderConfig(
        **sizes(config, width=1024, layers=24, heads=8, mlp_width=2816),
        patch=patch,
        positions=SinCos() if native else Table(side, side, resize="bicubic_antialias"),
        norm="rms",
        norm_eps=field(config, "rms_norm_eps", float, 1e-5),
        activation=activation(config, "silu"),
        gated=True,
        bias=bias,
        qkv_bias="qkv" if bias else "",
        embedding_norm="patches",
        pool="query" if head else None,
    )


def read_lit(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read the image tower of a config.json with two towers, and the width they share."""
    within = {name.partition(".")[2] for name in names}
    tower = read(field(config, "vision_config", dict), within)
    return replace(tower, projection=field(config, "projection_dim", int, 512))


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Aimv2VisionConfig."""
    table = config.positions
    return write_sizes(config) | {
        "model_type": "aimv2_vision_model",
        "architectures": ["Aimv2VisionModel"],
        "image_size": table.rows * config.patch if isinstance(table, Table) else 224,
        "rms_norm_eps": config.norm_eps,
        "qkv_bias": config.bias,
        "mlp_bias": config.bias,
        "is_native": isinstance(table, SinCos),
        "use_head": config.pool is not None,
    }


def write_original(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as Apple published it: no image_size where any grid goes."""
    renamed = write(config) | {"model_type": "aimv2", "use_bias": config.bias}
    native = renamed.pop("is_native")
    absent = {"architectures", "mlp_bias", "use_head"} | ({"image_size"} if native else set())
    return {name: value for name, value in renamed.items() if name not in absent}


def write_lit(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json with the image tower alone; the text tower was skipped when loading."""
    tower = write(replace(config, projection=None))
    return {"model_type": "aimv2", "vision_config": tower, "projection_dim": config.projection}


def images(config: EncoderConfig) -> ImageConfig:
    """Return Apple's preprocessing: CLIP's statistics; the native variant takes any size."""
    table = config.positions
    side = table.rows * config.patch if isinstance(table, Table) else 0
    sizing = ShortestEdge(side, crop=(side, side)) if side else None
    return ImageConfig(config.patch, CLIP_MEAN, CLIP_STD, "bicubic", sizing)


def beside_text(
    name: str, rules: tuple[Rule, ...], tower: str, projector: str, skipped: tuple[str, ...]
) -> Layout:
    """Return the layout of an image tower that stands beside a text tower: LiT."""
    [last_norm] = next(rule for rule in rules if rule.ours == "norm.weight").theirs
    projected = (*prefixed(rules, tower), rename("projection.weight", projector))
    return Layout(name, tower + last_norm, projected, read_lit, write_lit, skipped=skipped)


FAMILY = Family(
    name="AIMv2",
    model_types=("aimv2_vision_model", "aimv2"),
    layouts=(
        Layout("transformers", "rms_norm.weight", TRANSFORMERS_RULES, read, write),
        Layout("original", "trunk.post_trunk_norm.weight", ORIGINAL_RULES, read, write_original),
        beside_text(
            "transformers",
            TRANSFORMERS_RULES,
            "vision_model.",
            "visual_projection.weight",
            ("text_model", "text_projection", "logit_scale"),
        ),
        beside_text(
            "original",
            ORIGINAL_RULES,
            "image_encoder.",
            "image_projector.weight",
            ("text_encoder", "text_projector", "log_logit_scale"),
        ),
    ),
    images=images,
    checkpoints=(
        *(f"apple/aimv2-{size}-patch14-{side}" for size in SIZES for side in (224, 336, 448)),
        *(f"apple/aimv2-large-patch14-{kind}" for kind in VARIANTS),
    ),
)


class AIMv2Packing(Encoder):
    """AIMv2 on packs: `apple/aimv2-*`."""

    family = FAMILY


Aimv2VisionEmbeddings = PatchEmbeddings
Aimv2PackingAttention = Attention
Aimv2PackingEncoderLayer = Block
Aimv2PackingEncoder = Blocks
