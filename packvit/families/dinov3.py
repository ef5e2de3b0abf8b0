"""DINOv3's vision transformers: rotary positions for any grid, class token and registers first.

Files on the hub name blocks `layer.I`, newer versions of the library `model.layer.I` in memory.
The reference draws random rotary scales in training; here positions are always exact.

Source: "DINOv3", arXiv:2508.10104; transformers 5.17, models/dinov3_vit.
"""

from collections.abc import Collection
from typing import Any

from packvit.checkpoints.config_json import (
    Json,
    activation,
    base,
    entry,
    sizes,
    square,
    write_sizes,
)
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import Family, Layout, Reference, Variant
from packvit.checkpoints.rules import Rule, convolution, fuse, gated, layers, rename, reshape
from packvit.config import IMAGENET_STATISTICS, EncoderConfig, Exact, ImageConfig, Rotary
from packvit.encoder import Encoder


def rules(block: str) -> tuple[Rule, ...]:
    """Return the rules for checkpoints that name a block `block`."""
    ours = "encoder.layers.{i}."
    return (
        *convolution("embeddings.patches", "embeddings.patch_embeddings"),
        reshape("embeddings.class_token", "embeddings.cls_token", 1, 1),
        reshape("embeddings.registers", "embeddings.register_tokens", 1),
        *layers(
            ours,
            block,
            {
                "attention_norm": "norm1",
                "attention.qkv": "attention.q_proj attention.k_proj attention.v_proj",
                "attention.out": "attention.o_proj",
                "mlp_norm": "norm2",
                "mlp.up": "mlp.up_proj",
                "mlp.down": "mlp.down_proj",
            },
        ),
        *gated(f"{ours}mlp.gate_up", f"{block}mlp.", "gate_proj up_proj"),
        fuse(
            f"{ours}attention.qkv.qv_bias",
            f"{block}attention.q_proj.bias",
            f"{block}attention.v_proj.bias",
        ),
        rename(f"{ours}attention_scale.scale", f"{block}layer_scale1.lambda1"),
        rename(f"{ours}mlp_scale.scale", f"{block}layer_scale2.lambda1"),
        *layers("", "", {"norm": "norm"}),
    )


def read(config: Json, names: Collection[str]) -> EncoderConfig:
    """Read config.json.

    Raises: CheckpointError for biases in a combination that no published checkpoint has.
    """
    defaults = {"query_bias": True, "key_bias": False, "value_bias": True}
    parts = [name[0] for name, on in defaults.items() if entry(config, name, bool, on)]
    biased = "".join(parts)
    rest = {entry(config, name, bool, True) for name in ("proj_bias", "mlp_bias")}
    if biased not in ("qkv", "qv", "") or len(rest) != 1:
        raise CheckpointError(
            f'config.json gives biases to "{biased}" of q, k and v, and {sorted(rest)} to '
            "projection and MLP; packvit knows qkv, qv or none, and one answer for the others."
        )
    return EncoderConfig(
        **sizes(config, width=384, layers=12, heads=6, mlp_width=1536),
        patch=square(config, "patch_size", 16),
        positions=None,
        rotary=Rotary(base(config, 100.0)),
        norm="layer",
        norm_eps=entry(config, "layer_norm_eps", float, 1e-5),
        activation=activation(config, "gelu"),
        gated=entry(config, "use_gated_mlp", bool, False),
        bias=rest.pop(),
        qkv_bias=biased,
        layer_scale=True,
        class_token=True,
        registers=entry(config, "num_register_tokens", int, 0),
        pool="class",
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """Write config.json as transformers' DINOv3ViTConfig."""
    assert isinstance(config.rotary, Rotary)
    biases = {"query_bias": "q", "key_bias": "k", "value_bias": "v"}
    return write_sizes(config) | {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "layer_norm_eps": config.norm_eps,
        "rope_theta": config.rotary.base,
        "use_gated_mlp": config.gated,
        "num_register_tokens": config.registers,
        "proj_bias": config.bias,
        "mlp_bias": config.bias,
        **{name: part in config.qkv_bias for name, part in biases.items()},
    }


def images(config: EncoderConfig) -> ImageConfig:
    """Return DINOv3's preprocessing, which resizes to a square; ours rounds to 8 bits between."""
    return ImageConfig(config.patch, *IMAGENET_STATISTICS, "bilinear", Exact(224, 224))


# Where a checkpoint has no registers, transformers writes an empty tensor of them.
CARRIED = {"mask_token": "embeddings.mask_token", "registers": "embeddings.register_tokens"}
WEB = ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")

FAMILY = Family(
    name="DINOv3",
    model_types=("dinov3_vit",),
    layouts=tuple(
        Layout(
            "transformers",
            f"{block}0.norm1.weight",
            rules(f"{block}{{i}}."),
            read,
            write,
            carried=CARRIED,
        )
        for block in ("layer.", "model.layer.")
    ),
    images=images,
    checkpoints=(
        *(f"facebook/dinov3-{size}-pretrain-lvd1689m" for size in WEB),
        *(f"facebook/dinov3-{size}-pretrain-sat493m" for size in ("vitl16", "vit7b16")),
    ),
    reference=Reference(
        variants=(
            Variant("plain", "DINOv3ViTModel"),
            Variant("gated", "DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu"}),
        ),
        processor="DINOv3ViTImageProcessor",
    ),
)


class DINOv3ViTPacking(Encoder):
    """DINOv3 on packs: `facebook/dinov3-vit*`."""

    family = FAMILY
