"""The blocks of AIMv2's image and text towers, as Apple's files and transformers' name them.

Source: transformers 5.17, models/aimv2.
"""

from packvit.checkpoints.rules import gated, layers

APPLE_BLOCKS = (
    *layers(
        "encoder.layers.{i}.",
        "trunk.blocks.{i}.",
        {
            "attention_norm": "norm_1",
            "attention.qkv": "attn.qkv",
            "attention.out": "attn.proj",
            "mlp_norm": "norm_2",
            "mlp.down": "mlp.fc2",
        },
    ),
    *gated("encoder.layers.{i}.mlp.gate_up", "trunk.blocks.{i}.mlp.", "fc1 fc3"),
    *layers("", "", {"norm": "trunk.post_trunk_norm"}),
)
TRANSFORMERS_BLOCKS = (
    *layers(
        "encoder.layers.{i}.",
        "encoder.layers.{i}.",
        {
            "attention_norm": "rms_norm1",
            "attention.qkv": "attention.q_proj attention.k_proj attention.v_proj",
            "attention.out": "attention.out_proj",
            "mlp_norm": "rms_norm2",
            "mlp.down": "ffn.down_proj",
        },
    ),
    *gated("encoder.layers.{i}.mlp.gate_up", "encoder.layers.{i}.ffn.", "gate_proj up_proj"),
    *layers("", "", {"norm": "rms_norm"}),
)
