"""CLIP: OpenAI's, and open_clip's, MetaCLIP's and DFN's in transformers' layout.

Its tokens are not normed at the end, only the class token that becomes the pooled vector is.

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
transformers 5.17, models/clip (`pre_layrnorm` is spelt so in every checkpoint).
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import (
    Json,
    activation,
    entry,
    sizes,
    square,
    tower,
    write_sizes,
)
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant, beside_text
from packvit.checkpoints.rules import convolution, layers, rename
from packvit.config import EncoderConfig, Table
from packvit.encoder import Encoder
from packvit.families.clip_siglip import CLIP_BLOCK, clip_images

RULES = (
    *convolution("embeddings.patches", "embeddings.patch_embedding"),
    rename("embeddings.class_token", "embeddings.class_embedding"),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
    *layers("", "", {"embeddings.norm": "pre_layrnorm", "norm": "post_layernorm"}),
    *layers("encoder.layers.{i}.", "encoder.layers.{i}.", CLIP_BLOCK),
)
PROJECTION = "visual_projection.weight"


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the vision tower, alone or beside a text tower."""
    inner = tower(config)
    patch = square(inner, "patch_size", 32)
    side = square(inner, "image_size", 224) // patch
    return EncoderConfig(
        **sizes(inner, width=768, layers=12, heads=12, mlp_width=3072),
        patch=patch,
        positions=Table(side, side, resize="bicubic", class_row=True),
        norm="layer",
        norm_eps=entry(inner, "layer_norm_eps", float, 1e-5),
        activation=activation(inner, "quick_gelu"),
        patch_bias=False,
        class_token=True,
        embedding_norm="tokens",
        final_norm="pooled",
        pool="class",
        # Beside a text tower the outer entry counts; the inner one is often a leftover.
        projection=entry(config, "projection_dim", int, 512) if PROJECTION in names else None,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' CLIPVisionConfig."""
    table, projected = config.positions, config.projection is not None
    assert isinstance(table, Table)
    return write_sizes(config) | {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"],
        "image_size": table.rows * config.patch,
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.projection or 512,
    }


ALONE = Layout(
    "transformers",
    "post_layernorm.weight",
    RULES,
    read,
    write,
    carried={"position_ids": "embeddings.position_ids"},
)
SKIPPED = ("text_model", "text_projection", "logit_scale")

REFERENCE = Reference(
    variants=(
        Variant("quick_gelu", "CLIPVisionModel"),
        Variant("gelu", "CLIPVisionModel", {"hidden_act": "gelu"}),
        Variant("projected", "CLIPVisionModelWithProjection", {"projection_dim": 24}),
        Variant("two towers", "CLIPModel"),
    ),
    processor="CLIPImageProcessorPil",
    interpolates=True,
)

FAMILY = Family(
    name="CLIP",
    model_types=("clip_vision_model", "clip"),
    layouts=(ALONE, beside_text(ALONE, SKIPPED, projection=PROJECTION)),
    images=clip_images,
    checkpoints=(
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-base-patch16",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14-336",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "facebook/metaclip-h14-fullcc2.5b",
    ),
    reference=REFERENCE,
)


class ClipPacking(Encoder):
    """CLIP's image tower on packs: `openai/clip-*` and its kin."""

    family = FAMILY
