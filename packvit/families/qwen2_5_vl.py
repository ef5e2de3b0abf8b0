"""The vision tower of Qwen2.5-VL: attention within windows, but for some layers.

A checkpoint is the whole model, of which the tower's tensors alone are read, or the tower saved by
itself. Positions are rotary alone, for any grid.

Source: "Qwen2.5-VL Technical Report", arXiv:2502.13923; transformers 5.17, models/qwen2_5_vl.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from packvit.checkpoints.config_json import Json, activation, entry, sizes, square, tower
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import gated
from packvit.config import CLIP_STATISTICS, EncoderConfig, Merger, Windows
from packvit.encoder import Encoder
from packvit.families import qwen_vl

RULES = (
    *qwen_vl.rules({"mlp.down": "mlp.down_proj"}, qwen_vl.MERGER),
    *gated("encoder.layers.{i}.mlp.gate_up", "blocks.{i}.mlp.", "gate_proj up_proj"),
)


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's.

    Raises: CheckpointError for windows smaller than a square of the merger.
    """
    inner = tower(config)
    patch, side = square(inner, "patch_size", 14), square(inner, "spatial_merge_size", 2)
    window = entry(inner, "window_size", int, 112)
    squares = window // side // patch  # that a window is wide
    if squares == 0:
        raise CheckpointError(
            f'config.json says "window_size": {window}, but a window holds at least one square of '
            f"the merger, {side * patch} pixels."
        )
    full = qwen_vl.layer_numbers(inner, "fullatt_block_indexes", (7, 15, 23, 31))
    return EncoderConfig(
        **sizes(inner, qwen_vl.WORDS, width=3584, layers=32, heads=16, mlp_width=3420),
        **qwen_vl.choices(inner),
        patch=patch,
        positions=None,
        norm="rms",
        activation=activation(inner, "silu"),
        gated=True,
        windows=Windows(squares * side, full),
        patch_bias=False,
        merger=Merger(entry(inner, "out_hidden_size", int, 3584), "rms", 1e-6, side),
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Qwen2_5_VLVisionConfig."""
    assert config.windows is not None
    assert config.merger is not None
    return qwen_vl.write_tower(config) | {
        "model_type": "qwen2_5_vl_vision",
        "architectures": ["Qwen2_5_VisionTransformerPretrainedModel"],
        "window_size": config.windows.side * config.patch,
        "fullatt_block_indexes": list(config.windows.full),
        "out_hidden_size": config.merger.width,
    }


ALONE = Layout("transformers", "merger.ln_q.weight", RULES, read, write)

FAMILY = Family(
    name="Qwen2.5-VL ViT",
    model_types=("qwen2_5_vl", "qwen2_5_vl_vision"),
    layouts=qwen_vl.layouts(ALONE),
    images=partial(qwen_vl.images, statistics=CLIP_STATISTICS, sizing=qwen_vl.PIXELS),
    checkpoints=tuple(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")),
    reference=Reference(
        variants=(
            Variant(
                "windows",
                "Qwen2_5_VisionTransformerPretrainedModel",
                {"fullatt_block_indexes": [1], "window_size": 64},
            ),
        ),
        processor="Qwen2VLImageProcessorPil",
        processor_options={"patch_size": 16},  # of the small model above
    ),
)


class Qwen25VisionTransformerPacking(Encoder):
    """Qwen2.5-VL's vision tower on packs: of `Qwen/Qwen2.5-VL-*`."""

    family = FAMILY
