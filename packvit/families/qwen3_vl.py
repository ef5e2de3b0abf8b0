"""The vision tower of Qwen3-VL and of what came after: a resized table and rotary positions.

A checkpoint is the whole model, of which the tower's tensors alone are read, or the tower saved by
itself. Qwen3-VL has a deepstack: mergers for some layers besides that of the last one.

Source: "Qwen3-VL Technical Report", arXiv:2511.21631; transformers 5.17, models/qwen3_vl and
qwen3_5.
"""

from collections.abc import Collection
from functools import partial
from math import isqrt
from typing import Any

from packvit.checkpoints.config_json import Json, activation, entry, sizes, square, tower
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import layers, rename
from packvit.config import HALF_STATISTICS, EncoderConfig, Merger, PixelRange, Table
from packvit.encoder import Encoder
from packvit.families import qwen_vl

MERGER = {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}
RULES = (
    *qwen_vl.rules({"mlp.up": "mlp.linear_fc1", "mlp.down": "mlp.linear_fc2"}, MERGER),
    *layers("merger.deepstack.{i}.", "deepstack_merger_list.{i}.", MERGER),
    rename("embeddings.positions", "pos_embed.weight"),
)
# Model types of config.json, each also with "_vision" behind it, for the tower by itself.
DEEP = ("qwen3_vl", "qwen3_vl_moe")
FLAT = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")
PIXELS = PixelRange(256 * 256, 4096 * 4096)


def types(names: Collection[str]) -> tuple[str, ...]:
    """Return model types, of whole models and of their towers."""
    return tuple(name + kind for name in names for kind in ("", "_vision"))


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json of the tower, alone or within the whole model's."""
    inner = tower(config)
    deep = inner.get("model_type", config.get("model_type")) in types(DEEP)
    places = entry(inner, "num_position_embeddings", int, 2304)
    side = isqrt(places)
    if side**2 != places:
        raise CheckpointError(
            f'config.json says "num_position_embeddings": {places}, which is no square of places.'
        )
    merger = Merger(
        entry(inner, "out_hidden_size", int, 3584),
        "layer",
        1e-6,
        square(inner, "spatial_merge_size", 2),
        qwen_vl.layer_numbers(inner, "deepstack_visual_indexes", (8, 16, 24)) if deep else (),
    )
    return EncoderConfig(
        **sizes(inner, qwen_vl.WORDS, width=1152, layers=27, heads=16, mlp_width=4304),
        **qwen_vl.choices(inner),
        patch=square(inner, "patch_size", 16),
        positions=Table(side, side, "bilinear_corners", any_grid=True),
        norm="layer",
        activation=activation(inner, "gelu_pytorch_tanh"),
        merger=merger,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' Qwen3VLVisionConfig, or without a deepstack 3.5's."""
    table, merger = config.positions, config.merger
    assert isinstance(table, Table)
    assert merger is not None
    deep = bool(merger.deepstack)
    return (
        qwen_vl.write_tower(config)
        | {
            "model_type": "qwen3_vl_vision" if deep else "qwen3_5_vision",
            "architectures": ["Qwen3VLVisionModel" if deep else "Qwen3_5VisionModel"],
            "num_position_embeddings": table.rows * table.columns,
            "out_hidden_size": merger.width,
        }
        | ({"deepstack_visual_indexes": list(merger.deepstack)} if deep else {})
    )


ALONE = Layout("transformers", "merger.linear_fc2.weight", RULES, read, write)
VL = ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B")

FAMILY = Family(
    name="Qwen3 ViT",
    model_types=types((*DEEP, *FLAT)),
    layouts=qwen_vl.layouts(ALONE),
    images=partial(qwen_vl.images, statistics=HALF_STATISTICS, sizing=PIXELS),
    checkpoints=(
        *(f"Qwen/Qwen3-VL-{size}-Instruct" for size in VL),
        *(f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B")),
    ),
    reference=Reference(
        variants=(
            Variant("deepstack", "Qwen3VLVisionModel", {"deepstack_visual_indexes": [0, 2]}),
            Variant("plain", "Qwen3_5VisionModel"),
        ),
        processor="Qwen2VLImageProcessorPil",
        processor_options={
            "size": {"shortest_edge": PIXELS.least, "longest_edge": PIXELS.most},
            "patch_size": 16,
            "image_mean": HALF_STATISTICS[0],
            "image_std": HALF_STATISTICS[1],
        },
    ),
)


class Qwen3VLVisionPacking(Encoder):
    """Qwen3's vision tower on packs: of `Qwen/Qwen3-VL-*`, `Qwen/Qwen3.5-*`."""

    family = FAMILY
