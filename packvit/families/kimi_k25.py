"""MoonViT, the vision tower of Kimi K2.5 and K2.6, and of Kimi-VL: clips attend as a whole.

A table is resized and added, rotary positions turn queries and keys, and a sine-cosine tells the
frames of a clip apart; Kimi-VL's takes images alone, which to K2.5's are clips of one frame. A
checkpoint is the whole model under its published names ("original"), or the tower as transformers
saves it ("transformers"), without the projector that merges.

Source: transformers 5.17, models/kimi_k25 and, for the published names, conversion_mapping.py; for
Kimi-VL's names sglang 0.5.8, models/kimi_vl_moonvit.py and kimi_vl.py.
"""

from dataclasses import replace

from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import Rule, convolution, layers, neighbours, prefixed, square_table
from packvit.config import HALF_STATISTICS, EncoderConfig, ImageConfig, PaddedPatches, Table
from packvit.encoder import Encoder
from packvit.families.kimi_entries import (
    PROJECTORS,
    SIDE,
    read,
    write,
    write_images_alone,
    write_whole,
)

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
OLD_RULES = (
    *RULES[:2],
    square_table("embeddings.positions", "patch_embed.pos_emb.weight"),
    *layers("encoder.layers.{i}.", "encoder.blocks.{i}.", OLD_BLOCK),
    *neighbours("encoder.layers.{i}.attention.qkv", "encoder.blocks.{i}.wqkv"),
    *layers("", "encoder.", {"norm": "final_layernorm"}),
)


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
