"""SigLIP, and the SigLIP2 checkpoints of a fixed size, which are of the same model type.

Source: "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343; transformers 5.17,
models/siglip.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, square, tower
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant, beside_text
from packvit.checkpoints.rules import convolution, layers, rename
from packvit.config import HALF_STATISTICS, EncoderConfig, Exact, ImageConfig, Table
from packvit.encoder import Encoder
from packvit.families.clip_siglip import CLIP_BLOCK, PROBE_HEAD, read_siglip, write_siglip

RULES = (
    *convolution("embeddings.patches", "embeddings.patch_embedding"),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
    *layers("encoder.layers.{i}.", "encoder.layers.{i}.", CLIP_BLOCK),
    *layers("", "", {"norm": "post_layernorm"}),
    *PROBE_HEAD,
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the vision tower, alone or beside a text tower."""
    config = tower(config)
    patch = square(config, "patch_size", 16)
    side = square(config, "image_size", 224) // patch
    return read_siglip(config, names, patch, Table(side, side, resize="bicubic"))


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' SiglipVisionConfig."""
    table = config.positions
    assert isinstance(table, Table)
    written = write_siglip(config, "siglip_vision_model", "SiglipVisionModel")
    return written | {"image_size": table.rows * config.patch}


def images(config: EncoderConfig) -> ImageConfig:
    """Return SigLIP's preprocessing: a square, whatever the aspect ratio was."""
    table = config.positions
    assert isinstance(table, Table)
    side = table.rows * config.patch
    return ImageConfig(config.patch, *HALF_STATISTICS, "bicubic", Exact(side, side))


ALONE = Layout(
    "transformers",
    "post_layernorm.weight",
    RULES,
    read,
    write,
    carried={"position_ids": "embeddings.position_ids"},
)

REFERENCE = Reference(
    variants=(
        Variant("plain", "SiglipVisionModel"),
        Variant("headless", "SiglipVisionModel", {"vision_use_head": False}),
        Variant("two towers", "SiglipModel"),
    ),
    processor="SiglipImageProcessorPil",
    interpolates=True,
)

FAMILY = Family(
    name="SigLIP",
    model_types=("siglip_vision_model", "siglip"),
    layouts=(ALONE, beside_text(ALONE, ("text_model", "logit_scale", "logit_bias"))),
    images=images,
    checkpoints=(
        *(f"google/siglip-base-patch16-{side}" for side in (224, 256, 384, 512)),
        *(f"google/siglip-large-patch16-{side}" for side in (256, 384)),
        *(f"google/siglip-so400m-patch14-{side}" for side in (224, 384)),
        *(f"google/siglip2-base-patch16-{side}" for side in (224, 256, 384, 512)),
        *(f"google/siglip2-large-patch16-{side}" for side in (256, 384, 512)),
        *(f"google/siglip2-so400m-patch14-{side}" for side in (224, 384)),
        *(f"google/siglip2-so400m-patch16-{side}" for side in (256, 384, 512)),
    ),
    reference=REFERENCE,
    pools_to_text=True,
)


class SiglipPacking(Encoder):
    """SigLIP and fixed-size SigLIP2 on packs: `google/siglip-*`, `google/siglip2-*`."""

    family = FAMILY
