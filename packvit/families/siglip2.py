"""SigLIP2 NaFlex: `google/siglip2-*-naflex`, any grid by resizing a learned table.

Only these two are NaFlex; the other siglip2 repositories are of a fixed size and of model type
"siglip" (siglip.py). Their patch embedding is a linear layer over (row, column, channel) already.

Source: "SigLIP 2", arXiv:2502.14786; transformers 5.17, models/siglip2.
"""

from collections.abc import Collection
from math import isqrt
from typing import Any

from packvit.checkpoints.config_json import Json, entry, square, tower
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant, beside_text
from packvit.checkpoints.rules import layers, rename
from packvit.config import HALF_STATISTICS, EncoderConfig, ImageConfig, MostPatches, Table
from packvit.encoder import Encoder
from packvit.families.clip_siglip import CLIP_BLOCK, PROBE_HEAD, read_siglip, write_siglip
from packvit.model.embeddings import PatchEmbeddings
from packvit.model.layers import Attention, Block, Blocks

RULES = (
    *layers("embeddings.", "embeddings.", {"patches": "patch_embedding"}),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
    *layers("encoder.layers.{i}.", "encoder.layers.{i}.", CLIP_BLOCK),
    *layers("", "", {"norm": "post_layernorm"}),
    *PROBE_HEAD,
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the vision tower, alone or beside a text tower."""
    config = tower(config)
    side = isqrt(entry(config, "num_patches", int, 256))
    table = Table(side, side, resize="bilinear_antialias", any_grid=True)
    return read_siglip(config, names, square(config, "patch_size", 16), table)


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Siglip2VisionConfig."""
    table = config.positions
    assert isinstance(table, Table)
    written = write_siglip(config, "siglip2_vision_model", "Siglip2VisionModel")
    return written | {"num_patches": table.rows * table.columns}


def images(config: EncoderConfig) -> ImageConfig:
    """Return NaFlex's preprocessing with its default of 256 patches."""
    return ImageConfig(config.patch, *HALF_STATISTICS, "bilinear", MostPatches(256))


ALONE = Layout("transformers", "post_layernorm.weight", RULES, read, write)

REFERENCE = Reference(
    variants=(
        Variant("NaFlex", "Siglip2VisionModel"),
        Variant("headless", "Siglip2VisionModel", {"vision_use_head": False}),
        Variant("two towers", "Siglip2Model"),
    ),
    processor="Siglip2ImageProcessorPil",
)

FAMILY = Family(
    name="SigLIP2 NaFlex",
    model_types=("siglip2_vision_model", "siglip2"),
    layouts=(ALONE, beside_text(ALONE, ("text_model", "logit_scale", "logit_bias"))),
    images=images,
    checkpoints=(
        "google/siglip2-base-patch16-naflex",
        "google/siglip2-so400m-patch16-naflex",
    ),
    reference=REFERENCE,
    pools_to_text=True,
)


class Siglip2NaflexPacking(Encoder):
    """SigLIP2 NaFlex on packs: `google/siglip2-*-naflex`."""

    family = FAMILY


Siglip2VisionEmbeddings = PatchEmbeddings
Siglip2PackingAttention = Attention
Siglip2PackingEncoderLayer = Block
Siglip2PackingEncoder = Blocks
