"""What the vision towers of Qwen's models share: patches of two frames, and a merger behind.

Source: transformers 5.17, models/qwen2_vl, qwen2_5_vl and qwen3_vl.
"""

from collections.abc import Mapping
from typing import Any

from packvit.checkpoints.config_json import Json, axial_base, entry, square, write_sizes
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Layout, beside_text
from packvit.checkpoints.rules import Rule, convolution, layers
from packvit.config import AxialRotary, EncoderConfig, ImageConfig, PixelRange, Statistics

WORDS = {  # of config.json, for our sizes
    "width": "hidden_size",
    "layers": "depth",
    "heads": "num_heads",
    "mlp_width": "intermediate_size",
    "channels": "in_channels",
}
MERGER = {"norm": "ln_q", "up": "mlp.0", "down": "mlp.2"}  # ours to theirs, before Qwen3
PIXELS = PixelRange(56 * 56, 28 * 28 * 1280)  # before Qwen3
FRAMES = 2  # of a patch: the number is in the shape of every published checkpoint's weights


def rules(mlp: Mapping[str, str], merger: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return the rules of a tower, by its names of the layers of an MLP and of a merger."""
    block = {
        "attention_norm": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "mlp_norm": "norm2",
    }
    return (
        *convolution("embeddings.patches", "patch_embed.proj", frames=FRAMES),
        *layers("encoder.layers.{i}.", "blocks.{i}.", {**block, **mlp}),
        *layers("merger.last.", "merger.", merger),
    )


def layouts(alone: Layout) -> tuple[Layout, ...]:
    """Return the layouts of a tower by itself, and beside its language model, old and new.

    Source: the names that transformers 5.17 writes, and those of the published files, which may
    hold what predicts further tokens too (`mtp`).
    """
    return (
        alone,
        beside_text(alone, ("model.language_model", "lm_head", "mtp"), prefix="model.visual."),
        beside_text(alone, ("model", "lm_head"), prefix="visual."),
    )


def choices(config: Json) -> dict[str, Any]:
    """Return the choices that all towers share, of config.json's part about images.

    Raises: CheckpointError for positions or patches that no published tower has.
    """
    frames = square(config, "temporal_patch_size", FRAMES)
    if frames != FRAMES:
        raise CheckpointError(
            f'config.json says "temporal_patch_size": {frames}; packvit knows {FRAMES}.'
        )
    return {
        "rotary": AxialRotary(axial_base(config)),
        "temporal": FRAMES,
        "norm_eps": 1e-6,  # config.json says nothing about it
        "final_norm": None,
    }


def layer_numbers(config: Json, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers that an entry of config.json lists.

    Raises: CheckpointError for numbers that are not layers, or the same one twice.
    """
    layers = entry(config, name, (list, tuple), default)
    depth = entry(config, WORDS["layers"], int, 1 + max(default))
    known = all(type(layer) is int and 0 <= layer < depth for layer in layers)
    if not known or len({*layers}) < len(layers):
        raise CheckpointError(
            f'config.json says "{name}": {layers}, but it must name layers below {depth}, each '
            "once."
        )
    return tuple(layers)


def write_tower(config: EncoderConfig, words: Mapping[str, str] = WORDS) -> dict[str, Any]:
    """Write what all towers share of config.json, but for the name of the model."""
    assert isinstance(config.rotary, AxialRotary)
    assert config.merger is not None
    return write_sizes(config, words) | {
        "rope_parameters": {"rope_type": "axial", "rope_theta": config.rotary.base},
        "spatial_merge_size": config.merger.side,
        "temporal_patch_size": config.temporal,
    }


def images(
    config: EncoderConfig, statistics: tuple[Statistics, Statistics], sizing: PixelRange
) -> ImageConfig:
    """Return the preprocessing: the image's own size, in whole squares and within bounds."""
    assert config.merger is not None
    return ImageConfig(config.patch, *statistics, "bicubic", sizing, config.merger.side)
