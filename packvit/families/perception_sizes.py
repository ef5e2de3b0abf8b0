"""The architectures of Perception Encoder, by timm's names and in timm's arguments.

Source: timm 1.0.31, models/eva.py.
"""

from typing import Any

from packvit.checkpoints.config_json import Json, entry, square
from packvit.checkpoints.errors import CheckpointError
from packvit.config import AxialRotary, EncoderConfig, Table

# timm's arguments: those of all architectures, by size, and of some.
COMMON: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "class_token": True,
    "rope_grid_offset": 1.0,
    "init_values": None,
    "global_pool": "avg",
    "attn_pool_num_heads": 8,
    "attn_pool_mlp_ratio": 4.0,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "gigantic": {"embed_dim": 1536, "depth": 50, "num_heads": 16, "mlp_ratio": 8960 / 1536}
    | {"class_token": False, "rope_grid_offset": 0.0},
}
CORE, SCALED = {"global_pool": "map"}, {"init_values": 0.1}
KINDS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    *(("core", size, 16, 384, CORE) for size in ("tiny", "small")),
    ("core", "base", 16, 224, CORE),
    ("core", "large", 14, 336, CORE),
    ("core", "gigantic", 14, 448, CORE),
    ("lang", "large", 14, 448, SCALED | {"depth": 23}),
    ("lang", "gigantic", 14, 448, SCALED | {"depth": 47}),
    *(("spatial", size, 16, 512, {}) for size in ("tiny", "small", "base")),
    ("spatial", "large", 14, 448, {}),
    ("spatial", "gigantic", 14, 448, SCALED),
)
ARCHITECTURES = {
    f"vit_pe_{kind}_{size}_patch{patch}_{side}": COMMON
    | SIZES[size]
    | {"patch_size": patch, "img_size": side, "ref_feat_shape": [side // patch] * 2}
    | own
    for kind, size, patch, side, own in KINDS
}

IMAGES = {"interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}

# What pools, and with it what is normed, is no argument but a matter of the name.
OTHERS = {"map": "vit_pe_core_tiny_patch16_384", "avg": "vit_pe_spatial_tiny_patch16_512"}


def arguments_in(config: Json) -> dict[str, Any]:
    """Return the arguments that a config.json of timm's makes an architecture with.

    Raises: CheckpointError for arguments or preprocessing that no published checkpoint has.
    """
    known = ARCHITECTURES[entry(config, "architecture", str)]
    classes = entry(config, "num_classes", int, 0)
    again = {"in_chans": 3, "num_classes": classes}  # which timm itself writes among the arguments
    given = entry({"model_args": {}, **config}, "model_args", dict)
    given = {key: value for key, value in given.items() if again.get(key, ...) != value}
    made: dict[str, Any] = known | given
    shown = {**IMAGES, **entry({"pretrained_cfg": {}, **config}, "pretrained_cfg", dict)}
    side = square(made, "img_size") // square(made, "patch_size")
    alike = {**shown, **IMAGES} == shown and made["ref_feat_shape"] == [side, side]
    if not alike or made.keys() > known.keys() or made["global_pool"] not in ("map", "avg"):
        raise CheckpointError(
            f'config.json says "model_args": {given} and "pretrained_cfg": {shown}; packvit knows '
            f'{", ".join(COMMON)}, "ref_feat_shape" of {side} x {side} patches, and {IMAGES}.'
        )
    return made


def architecture_of(made: dict[str, Any]) -> str:
    """Return the name of an architecture, or of one that pools alike, if it has none."""
    named = (name for name, known in ARCHITECTURES.items() if known == made)
    return next(named, OTHERS[made["global_pool"]])


def arguments_of(config: EncoderConfig) -> dict[str, Any]:
    """Return the arguments that make an encoder's architecture."""
    table, rotary, probe = config.positions, config.rotary, config.probe
    assert isinstance(table, Table)
    assert isinstance(rotary, AxialRotary)
    made = COMMON | {
        "mlp_ratio": config.mlp_width / config.width,
        "embed_dim": config.width,
        "depth": config.layers,
        "num_heads": config.heads,
        "patch_size": config.patch,
        "img_size": table.rows * config.patch,
        "ref_feat_shape": [table.rows, table.columns],
        "class_token": config.class_token,
        "rope_grid_offset": float(rotary.offset),
        "init_values": 0.1 if config.layer_scale else None,
        "global_pool": "map" if config.pool else "avg",
    }
    if probe:
        made["attn_pool_num_heads"] = probe.heads
        made["attn_pool_mlp_ratio"] = probe.mlp_width / config.width
    return made
