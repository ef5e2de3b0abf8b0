"""What CLIP's and SigLIP's checkpoints share, and AIMv2 and OneVision-Encoder took over."""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import Json, activation, entry, sizes, write_sizes
from packvit.checkpoints.rules import Rule, layers, rename, reshape
from packvit.config import CLIP_STATISTICS, EncoderConfig, ImageConfig, ShortestEdge, Table

# How CLIP named the layers of a block, which SigLIP and SigLIP2 took over: ours to theirs.
CLIP_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def probe_head(norm: str) -> tuple[Rule, ...]:
    """Return the rules of SigLIP's pooling head, which calls its norm so."""
    names = {"out": "attention.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    return (
        reshape("head.probe", "head.probe", 1, 1),
        rename("head.qkv.weight", "head.attention.in_proj_weight"),
        rename("head.qkv.bias", "head.attention.in_proj_bias"),
        *layers("head.", "head.", names | {"norm": norm}),
    )


PROBE_HEAD = probe_head("layernorm")  # the same in both generations


def read_siglip(
    config: Json, names: Collection[str], patch: int, positions: Table
) -> EncoderConfig:
    """Read what SigLIP and SigLIP2 NaFlex share of the vision tower's config.json."""
    return EncoderConfig(
        **sizes(config, width=768, layers=12, heads=12, mlp_width=3072),
        patch=patch,
        positions=positions,
        norm="layer",
        norm_eps=entry(config, "layer_norm_eps", float, 1e-6),
        activation=activation(config, "gelu_pytorch_tanh"),
        pool="probe" if any(name.endswith("head.probe") for name in names) else None,
    )


def write_siglip(config: EncoderConfig, model: str, architecture: str) -> dict[str, Any]:
    """Write what SigLIP and SigLIP2 NaFlex share of config.json."""
    written = write_sizes(config) | {
        "model_type": model,
        "architectures": [architecture],
        "layer_norm_eps": config.norm_eps,
    }
    return written if config.pool else written | {"vision_use_head": False}


def clip_images(config: EncoderConfig) -> ImageConfig:
    """Return the preprocessing of CLIP, which AIMv2 took over: a square from the centre.

    An encoder that takes any grid takes images as they are.
    """
    table = config.positions
    side = table.rows * config.patch if isinstance(table, Table) else 0
    sizing = ShortestEdge(side, crop=(side, side)) if side else None
    return ImageConfig(config.patch, *CLIP_STATISTICS, "bicubic", sizing)
