"""What config.json says of DINOv2's blocks, which TIPSv2 and C-RADIO have too.

Source: transformers 5.17, models/dinov2, tipsv2 and radio.
"""

from typing import Any

from packvit.checkpoints.config_json import (
    SIZES,
    Json,
    activation,
    entry,
    sizes,
    square,
    write_sizes,
)
from packvit.config import EncoderConfig

WORDS = {ours: theirs for ours, theirs in SIZES.items() if ours != "mlp_width"}


def read_blocks(config: Json, **defaults: int) -> dict[str, Any]:
    """Return all that a configuration says of blocks and patches; `defaults` are its class's.

    `mlp_ratio` and `use_swiglu_ffn` give the width of the MLP.
    """
    size = sizes(config, SIZES, **defaults)
    gated = entry(config, "use_swiglu_ffn", bool, False)
    ratio = entry(config, "mlp_ratio", (int, float), 4)
    return size | {
        "mlp_width": mlp_width(size["width"], ratio, gated),
        "patch": square(config, "patch_size"),
        "norm": "layer",
        "norm_eps": entry(config, "layer_norm_eps", float, 1e-6),
        "activation": "silu" if gated else activation(config, "gelu"),
        "gated": gated,
        "qkv_bias": "qkv" if entry(config, "qkv_bias", bool, True) else "",
    }


def write_blocks(config: EncoderConfig) -> dict[str, Any]:
    """Write what `read_blocks` reads."""
    activations = {"hidden_act": "gelu"} if config.gated else {}  # of which a gated MLP has none
    return (
        write_sizes(config, WORDS)
        | activations
        | {
            "layer_norm_eps": config.norm_eps,
            "mlp_ratio": mlp_ratio(config),
            "use_swiglu_ffn": config.gated,
            "qkv_bias": config.qkv_bias == "qkv",
        }
    )


def mlp_width(width: int, ratio: int | float, gated: bool) -> int:
    """Return the width of an MLP by its ratio: of a gated one two thirds, in whole eights."""
    inner = int(width * ratio)
    return (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner


def mlp_ratio(config: EncoderConfig) -> int | float:
    """Return a ratio that gives the width of an encoder's MLP: a whole number, if one does."""
    exact = config.mlp_width * (1.5 if config.gated else 1) / config.width
    ratios = (round(exact), exact, exact + 0.5 / config.width)
    widths = (mlp_width(config.width, ratio, config.gated) for ratio in ratios)
    return next(r for r, w in zip(ratios, widths, strict=True) if w == config.mlp_width)
