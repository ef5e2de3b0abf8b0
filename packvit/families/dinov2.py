"""DINOv2, with and without registers: any grid by resizing a learned table, class token first.

Without registers the table is resized without antialiasing, with them it is antialiased.

Source: "DINOv2", arXiv:2304.07193; "Vision Transformers Need Registers", arXiv:2309.16588;
transformers 5.17, models/dinov2 and models/dinov2_with_registers.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, entry, square
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import Rule, convolution, gated, layers, rename, reshape
from packvit.config import IMAGENET_STATISTICS, EncoderConfig, ImageConfig, ShortestEdge, Table
from packvit.encoder import Encoder
from packvit.families.dinov2_blocks import read_blocks, write_blocks

RULES = (
    *convolution("embeddings.patches", "embeddings.patch_embeddings.projection"),
    reshape("embeddings.positions", "embeddings.position_embeddings", 1),
    reshape("embeddings.class_token", "embeddings.cls_token", 1, 1),
    reshape("embeddings.registers", "embeddings.register_tokens", 1),
    *layers(
        "encoder.layers.{i}.",
        "encoder.layer.{i}.",
        {
            "attention_norm": "norm1",
            "attention.qkv": (
                "attention.attention.query attention.attention.key attention.attention.value"
            ),
            "attention.out": "attention.output.dense",
            "mlp_norm": "norm2",
        },
    ),
    rename("encoder.layers.{i}.attention_scale.scale", "encoder.layer.{i}.layer_scale1.lambda1"),
    rename("encoder.layers.{i}.mlp_scale.scale", "encoder.layer.{i}.layer_scale2.lambda1"),
    *layers("", "", {"norm": "layernorm"}),
)
OURS, THEIRS = "encoder.layers.{i}.mlp.", "encoder.layer.{i}.mlp."
# Where a checkpoint has no registers, transformers writes an empty tensor of them.
CARRIED = {"mask_token": "embeddings.mask_token", "registers": "embeddings.register_tokens"}
PLAIN = layers(OURS, THEIRS, {"down": "fc2", "up": "fc1"})
GATED = (
    *layers(OURS, THEIRS, {"down": "weights_out"}),
    *gated(f"{OURS}gate_up", THEIRS, "weights_in"),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json."""
    registered = config.get("model_type") == "dinov2_with_registers"
    patch = {"patch_size": 16 if registered else 14}
    blocks = read_blocks({**patch, **config}, width=768, layers=12, heads=12)
    side = square(config, "image_size", 224) // blocks["patch"]
    resize = "bicubic_antialias" if registered else "bicubic"
    return EncoderConfig(
        **blocks,
        positions=Table(side, side, resize, any_grid=True, class_row=True),
        layer_scale=True,
        class_token=True,
        registers=entry(config, "num_register_tokens", int, 4) if registered else 0,
        pool="class",
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Dinov2Config or Dinov2WithRegistersConfig."""
    table = config.positions
    assert isinstance(table, Table)
    kind = "WithRegisters" if table.resize == "bicubic_antialias" else ""  # also of none
    written = write_blocks(config) | {
        "model_type": "dinov2_with_registers" if kind else "dinov2",
        "architectures": [f"Dinov2{kind}Model"],
        "image_size": table.rows * config.patch,
    }
    return written | ({"num_register_tokens": config.registers} if kind else {})


def images(config: EncoderConfig) -> ImageConfig:
    """Return DINOv2's preprocessing: the shortest edge to 256, then 224 from the centre."""
    sizing = ShortestEdge(256, crop=(224, 224))
    return ImageConfig(config.patch, *IMAGENET_STATISTICS, "bicubic", sizing)


def layout(mlp: tuple[Rule, ...]) -> Layout:
    """Return the layout of checkpoints with one kind of MLP, told by its last matrix."""
    marker = mlp[0].theirs[0].format(i=0)
    return Layout("transformers", marker, (*RULES, *mlp), read, write, carried=CARRIED)


SIZES = ("small", "base", "large", "giant")

REFERENCE = Reference(
    variants=(
        Variant("plain", "Dinov2Model"),
        Variant("SwiGLU", "Dinov2Model", {"use_swiglu_ffn": True}),
        Variant("registers", "Dinov2WithRegistersModel"),
    ),
    processor="BitImageProcessorPil",
    processor_options={
        "size": {"shortest_edge": 256},
        "image_mean": IMAGENET_STATISTICS[0],
        "image_std": IMAGENET_STATISTICS[1],
    },
)

FAMILY = Family(
    name="DINOv2",
    model_types=("dinov2", "dinov2_with_registers"),
    layouts=(layout(PLAIN), layout(GATED)),
    images=images,
    checkpoints=(
        *(f"facebook/dinov2-{size}" for size in SIZES),
        *(f"facebook/dinov2-with-registers-{size}" for size in SIZES),
    ),
    reference=REFERENCE,
)


class Dinov2Packing(Encoder):
    """DINOv2 on packs: `facebook/dinov2-*`, with and without registers."""

    family = FAMILY
