"""The vision tower of Qwen2-VL: a plain transformer with rotary positions alone, for any grid.

A checkpoint is the whole model, of which the tower's tensors alone are read, or the tower saved by
itself. Its config.json calls the width of the tokens that leave the merger `hidden_size`.

Source: "Qwen2-VL", arXiv:2409.12191; transformers 5.17, models/qwen2_vl.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from packvit.checkpoints.config_json import Json, activation, entry, sizes, square, tower
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.config import CLIP_STATISTICS, EncoderConfig, Merger
from packvit.encoder import Encoder
from packvit.families import qwen_vl

RULES = qwen_vl.rules({"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}, qwen_vl.MERGER)
WORDS = {k: word for k, word in qwen_vl.WORDS.items() if k != "mlp_width"} | {"width": "embed_dim"}


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's."""
    inner = tower(config)
    size = sizes(inner, WORDS, width=1280, layers=32, heads=16)
    side = square(inner, "spatial_merge_size", 2)
    return EncoderConfig(
        **size,
        **qwen_vl.choices(inner),
        mlp_width=int(size["width"] * entry(inner, "mlp_ratio", (int, float), 4)),
        patch=square(inner, "patch_size", 14),
        positions=None,
        norm="layer",
        activation=activation(inner, "quick_gelu"),
        patch_bias=False,
        merger=Merger(entry(inner, "hidden_size", int, 3584), "layer", 1e-6, side),
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Qwen2VLVisionConfig."""
    assert config.merger is not None
    return qwen_vl.write_tower(config, WORDS) | {
        "model_type": "qwen2_vl_vision",
        "architectures": ["Qwen2VisionTransformerPretrainedModel"],
        "mlp_ratio": config.mlp_width // config.width,
        "hidden_size": config.merger.width,
    }


ALONE = Layout("transformers", "merger.ln_q.weight", RULES, read, write)

FAMILY = Family(
    name="Qwen2-VL ViT",
    model_types=("qwen2_vl", "qwen2_vl_vision"),
    layouts=qwen_vl.layouts(ALONE),
    images=partial(qwen_vl.images, statistics=CLIP_STATISTICS, sizing=qwen_vl.PIXELS),
    checkpoints=tuple(f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B")),
    reference=Reference(
        variants=(
            Variant(
                "plain",
                "Qwen2VisionTransformerPretrainedModel",
                {"embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2},
            ),
        ),
        processor="Qwen2VLImageProcessorPil",
        processor_options={"patch_size": 16},  # of the small model above
    ),
)


class Qwen2VisionTransformerPacking(Encoder):
    """Qwen2-VL's vision tower on packs: of `Qwen/Qwen2-VL-*`."""

    family = FAMILY
