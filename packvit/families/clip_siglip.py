"""What CLIP's and SigLIP's checkpoints share, and AIMv2 and OneVision-Encoder took over."""

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


def clip_images(config: EncoderConfig) -> ImageConfig:
    """Return the preprocessing of CLIP, which AIMv2 took over: a square from the centre.

    An encoder that takes any grid takes images as they are.
    """
    table = config.positions
    side = table.rows * config.patch if isinstance(table, Table) else 0
    sizing = ShortestEdge(side, crop=(side, side)) if side else None
    return ImageConfig(config.patch, *CLIP_STATISTICS, "bicubic", sizing)
