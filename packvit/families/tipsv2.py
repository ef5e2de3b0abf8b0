"""TIPSv2's vision tower: DINOv2 with one register, which is a second class token.

The class token, `pooled`, learned from captions of the web; the register, second row of `prefix`,
from synthetic ones. A checkpoint is the tower beside its text tower, or by itself, in Google's
names.

Source: "TIPSv2", github.com/google-deepmind/tips; transformers 5.17, models/tipsv2.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, entry, square, tower
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant, beside_text
from packvit.checkpoints.rules import Rule, convolution, gated, layers, rename, reshape
from packvit.config import UNCHANGED_STATISTICS, EncoderConfig, Exact, ImageConfig, Table
from packvit.encoder import Encoder
from packvit.families.dinov2_blocks import read_blocks, write_blocks

OURS, BLOCK = "encoder.layers.{i}.", "blocks.{i}."
RULES = (
    *convolution("embeddings.patches", "patch_embed.proj"),
    reshape("embeddings.positions", "pos_embed", 1),
    reshape("embeddings.class_token", "cls_token", 1, 1),
    reshape("embeddings.registers", "register_tokens", 1),
    *layers(
        OURS,
        BLOCK,
        {
            "attention_norm": "norm1",
            "attention.qkv": "attn.qkv",
            "attention.out": "attn.proj",
            "mlp_norm": "norm2",
        },
    ),
    rename(f"{OURS}attention_scale.scale", f"{BLOCK}ls1.gamma"),
    rename(f"{OURS}mlp_scale.scale", f"{BLOCK}ls2.gamma"),
    *layers("", "", {"norm": "norm"}),
)
PLAIN = layers(f"{OURS}mlp.", f"{BLOCK}mlp.", {"up": "c_fc", "down": "c_proj"})
GATED = (
    *layers(f"{OURS}mlp.", f"{BLOCK}mlp.", {"down": "w3"}),
    *gated(f"{OURS}mlp.gate_up", f"{BLOCK}mlp.", "w12"),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or beside its text tower."""
    inner = tower(config)
    blocks = read_blocks({"patch_size": 14, **inner}, width=768, layers=12, heads=12)
    side = square(inner, "image_size", 448) // blocks["patch"]
    return EncoderConfig(
        **blocks,
        positions=Table(side, side, "bilinear_antialias", any_grid=True, class_row=True),
        layer_scale=True,
        class_token=True,
        registers=entry(inner, "num_register_tokens", int, 1),
        pool="class",
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Tipsv2VisionConfig."""
    table = config.positions
    assert isinstance(table, Table)
    return write_blocks(config) | {
        "model_type": "tipsv2_vision_model",
        "architectures": ["Tipsv2VisionModel"],
        "image_size": table.rows * config.patch,
        "num_register_tokens": config.registers,
    }


def images(config: EncoderConfig) -> ImageConfig:
    """Return TIPSv2's preprocessing: a square, whatever the aspect ratio was, from 0 to 1."""
    table = config.positions
    assert isinstance(table, Table)
    side = table.rows * config.patch
    return ImageConfig(config.patch, *UNCHANGED_STATISTICS, "bilinear", Exact(side, side))


def layouts(mlp: tuple[Rule, ...]) -> tuple[Layout, Layout]:
    """Return the layouts of checkpoints with one kind of MLP, without a text tower and with one."""
    marker = mlp[0].theirs[0].format(i=0)
    carried = {"mask_token": "mask_token", "registers": "register_tokens"}  # where there are none
    alone = Layout("transformers", marker, (*RULES, *mlp), read, write, carried)
    return alone, beside_text(alone, ("text_encoder", "temperature"), prefix="vision_encoder.")


FAMILY = Family(
    name="TIPSv2",
    model_types=("tipsv2", "tipsv2_vision_model"),
    layouts=(*layouts(PLAIN), *layouts(GATED)),
    images=images,
    checkpoints=tuple(f"google/tipsv2-{size}14" for size in ("b", "l", "so400m", "g")),
    reference=Reference(
        variants=(
            Variant("plain", "Tipsv2VisionModel"),
            Variant("SwiGLU", "Tipsv2VisionModel", {"use_swiglu_ffn": True}),
        ),
        processor="Tipsv2ImageProcessor",
    ),
    pools_to_text=True,
    processor_normalizes=False,
)


class Tipsv2VisionPacking(Encoder):
    """TIPSv2's vision tower on packs: `google/tipsv2-*`."""

    family = FAMILY
