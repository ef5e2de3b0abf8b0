"""AIMv2: `apple/aimv2-*`, with positions for any grid ("native") or learned for one.

Two layouts are in circulation: Apple's "original" has q, k and v in one matrix, transformers keeps
each on its own. The LiT checkpoint wraps either beside a text tower, which is skipped.
Source: "AIMv2", arXiv:2411.14402; transformers 5.17, models/aimv2.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import (
    Json,
    activation,
    agreed,
    entry,
    sizes,
    square,
    tower,
    write_sizes,
)
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant, beside_text
from packvit.checkpoints.rules import convolution, layers, rename, reshape
from packvit.config import EncoderConfig, SinCos, Table
from packvit.encoder import Encoder
from packvit.families.aimv2_blocks import APPLE_BLOCKS, TRANSFORMERS_BLOCKS
from packvit.families.clip_siglip import clip_images
from packvit.model.embeddings import PatchEmbeddings
from packvit.model.layers import Attention, Block, Blocks

VARIANTS = ("native", "224-distilled", "336-distilled", "224-lit")  # of the large size alone
APPLE_TYPE = {"model_type": "aimv2"}
SHARED = ("visual_projection.weight", "image_projector.weight")  # of LiT, by layout
TEXT = ("text_model", "text_projection", "logit_scale")  # the other tower, by layout
TEXT_APPLE = ("text_encoder", "text_projector", "log_logit_scale")

APPLE = (
    *convolution("embeddings.patches", "preprocessor.patchifier.proj"),
    reshape("embeddings.positions", "preprocessor.pos_embed", 1),
    *layers("", "", {"embeddings.norm": "preprocessor.patchifier.norm"}),
    *APPLE_BLOCKS,
    reshape("head.query", "head.cls_token", 1, 1),
    *layers("head.", "head.", {"kv": "k v", "out": "linear"}),
)
TRANSFORMERS_RULES = (
    *convolution("embeddings.patches", "embeddings.patch_embed"),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
    *layers("", "", {"embeddings.norm": "embeddings.rms_norm"}),
    *TRANSFORMERS_BLOCKS,
    reshape("head.query", "head.cls_token", 1, 1),
    *layers("head.", "head.", {"kv": "k_proj v_proj", "out": "output_proj"}),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of either layout; Apple's native variant is the one without image_size."""
    inner = tower(config)
    rewritten = inner.get("model_type") == "aimv2_vision_model"
    native = entry(inner, "is_native", bool, not rewritten and "image_size" not in inner)
    headed = any(name.endswith("head.cls_token") for name in names)
    patch = square(inner, "patch_size", 14)
    side = 0 if native else square(inner, "image_size", 224) // patch
    bias = agreed(inner, "qkv_bias", "mlp_bias", "use_bias")
    return EncoderConfig(
        **sizes(inner, width=1024, layers=24, heads=8, mlp_width=2816),
        patch=patch,
        positions=SinCos() if native else Table(side, side, resize="bicubic_antialias"),
        norm="rms",
        norm_eps=entry(inner, "rms_norm_eps", float, 1e-5),
        activation=activation(inner, "silu"),
        gated=True,
        bias=bias,
        qkv_bias="qkv" if bias else "",
        embedding_norm="patches",
        pool="query" if entry(inner, "use_head", bool, rewritten or headed) else None,
        projection=entry(config, "projection_dim", int, 512) if {*SHARED} & {*names} else None,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Aimv2VisionConfig, or Aimv2Config with a projection."""
    table = config.positions
    written = write_sizes(config) | {
        "model_type": "aimv2_vision_model",
        "architectures": ["Aimv2VisionModel"],
        "image_size": table.rows * config.patch if isinstance(table, Table) else 224,
        "rms_norm_eps": config.norm_eps,
        "qkv_bias": config.bias,
        "mlp_bias": config.bias,
        "is_native": isinstance(table, SinCos),
        "use_head": config.pool is not None,
    }
    both = {"model_type": "aimv2", "vision_config": written, "projection_dim": config.projection}
    return both if config.projection else written


TRANSFORMERS = Layout("transformers", "rms_norm.weight", TRANSFORMERS_RULES, read, write)
ORIGINAL = Layout(
    "original", "trunk.post_trunk_norm.weight", APPLE, read, lambda c: write(c) | APPLE_TYPE
)

FAMILY = Family(
    name="AIMv2",
    model_types=("aimv2_vision_model", "aimv2"),
    layouts=(
        TRANSFORMERS,
        ORIGINAL,
        beside_text(TRANSFORMERS, TEXT, projection=SHARED[0]),
        beside_text(ORIGINAL, TEXT_APPLE, prefix="image_encoder.", projection=SHARED[1]),
    ),
    images=clip_images,
    checkpoints=tuple(
        f"apple/aimv2-{size}-patch14-{kind}"
        for size in ("large", "huge", "1B", "3B")
        for kind in (224, 336, 448, *(VARIANTS if size == "large" else ()))
    ),
    reference=Reference(
        variants=(
            Variant("native", "Aimv2VisionModel", {"is_native": True}),
            Variant("fixed", "Aimv2VisionModel"),
            Variant("headless", "Aimv2VisionModel", {"is_native": True, "use_head": False}),
            Variant("LiT", "Aimv2Model"),
        ),
        processor="CLIPImageProcessorPil",
    ),
)


class AIMv2Packing(Encoder):
    """AIMv2 on packs: `apple/aimv2-*`."""

    family = FAMILY


Aimv2VisionEmbeddings = PatchEmbeddings
Aimv2PackingAttention = Attention
Aimv2PackingEncoderLayer = Block
Aimv2PackingEncoder = Blocks
