"""Build timm's model of an encoder's architecture: a second reference.

Its code is another than transformers'; its weights are ours, under timm's names. timm is imported
only when it is asked for, and comes with torchvision.

Source: timm 1.0.31, models/vision_transformer.py, eva.py and naflexvit.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packvit.config import EncoderConfig, Rotary, Table
from packvit.encoder import Encoder
from packvit.verification.timm_reference import import_timm
from packvit.version import version_of

NAMES: Mapping[str, str] = {  # timm's to ours, of tensors, of layers, and of those in a block
    "patch_embed.proj": "embeddings.patches",
    "patch_embed.norm": "embeddings.norm",
    "norm_pre": "embeddings.norm",
    "cls_token": "embeddings.class_token",
    "reg_token": "embeddings.registers",
    "pos_embed": "embeddings.positions",
    "embeds.proj": "embeddings.patches",
    "embeds.pos_embed": "embeddings.positions",
    "norm": "norm",
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.q_bias": "attention.qkv.qv_bias",
    "attn.v_bias": "attention.qkv.qv_bias",
    "attn.proj": "attention.out",
    "ls1.gamma": "attention_scale.scale",
    "gamma_1": "attention_scale.scale",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc1_g": "mlp.gate_up",
    "mlp.fc1_x": "mlp.gate_up",
    "mlp.fc2": "mlp.down",
    "ls2.gamma": "mlp_scale.scale",
    "gamma_2": "mlp_scale.scale",
}
HALVES = {"mlp.fc1_g": 0, "mlp.fc1_x": 1}  # gate and up, whose rows alternate in ours
BIASES = {"attn.q_bias": 0, "attn.v_bias": 1}  # in ours one behind the other


DIFFERENT = "timm has no model with these positions or biases"


class NoCounterpartError(Exception):
    """timm has no model of an encoder's architecture."""


def timm_weights(wanted: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under timm's names and in timm's shapes.

    Raises: KeyError for a tensor of timm's that has no counterpart.
    """
    found = {}
    for key, like in wanted.items():
        name, opening = key, ""
        if key.startswith("blocks."):
            _, layer, name = key.split(".", 2)
            opening = f"encoder.layers.{layer}."
        stem, _, kind = name.rpartition(".")
        source = NAMES[name] if name in NAMES else f"{NAMES[stem]}.{kind}"
        tensor = ours[opening + source]
        if stem in HALVES:
            tensor = tensor[HALVES[stem] :: 2]
        if name in BIASES:
            tensor = tensor.chunk(2)[BIASES[name]]
        if name == "patch_embed.proj.weight":  # of flattened patches, channels last
            tensor = tensor.unflatten(1, (*like.shape[2:], 3)).permute(0, 3, 1, 2)
        found[key] = tensor.reshape(like.shape)
    return found


def timm_model(encoder: Encoder, dtype: torch.dtype) -> nn.Module:
    """Return timm's model with an encoder's weights, in eval mode on its device.

    Raises: NoCounterpartError; ImportError with the line that installs timm.
    """
    config, table = encoder.config, encoder.config.positions
    if config.merger or config.windows:
        raise NoCounterpartError("timm has no towers of multimodal models with these weights")
    import_timm("The second reference is timm")
    if isinstance(config.rotary, Rotary) and table is None:
        model = eva(config)
    elif not isinstance(table, Table) or not is_plain(config):
        raise NoCounterpartError(DIFFERENT)
    elif table.resize == "bilinear_antialias" and not config.prefix and not config.gated:
        model = naflex(config, table)
    elif table.resize in ("bicubic", "bicubic_antialias"):
        model = vision_transformer(config, table)
    else:
        raise NoCounterpartError(DIFFERENT)
    ours = {name: x.to("cpu") for name, x in encoder.state_dict().items()}
    if isinstance(table, Table) and table.class_row:  # timm adds no position to the class token
        first, rest = ours["embeddings.positions"][:1], ours["embeddings.positions"][1:]
        token = ours["embeddings.class_token"]
        ours |= {
            "embeddings.positions": rest,
            "embeddings.class_token": token + first.view_as(token),
        }
    if config.final_norm == "pooled":
        model.norm = nn.Identity()  # of the class token alone
    model.load_state_dict(timm_weights(model.state_dict(), ours))
    return model.eval().to(encoder.device, dtype)


def is_plain(config: EncoderConfig) -> bool:
    """Return whether timm's classes of learned positions have an encoder's other choices."""
    before_all = config.embedding_norm == "tokens"  # patches then have no bias in timm
    return not config.rotary and config.qkv_bias != "qv" and config.patch_bias is not before_all


def sizes(config: EncoderConfig) -> dict[str, Any]:
    """Return what all of timm's classes are told."""
    return {
        "patch_size": config.patch,
        "num_classes": 0,
        "global_pool": "",
        "embed_dim": config.width,
        "depth": config.layers,
        "num_heads": config.heads,
        "mlp_ratio": (config.mlp_width + 0.5) / config.width,  # which timm rounds down
        "init_values": 1.0 if config.layer_scale else None,
    }


def norm_layer(config: EncoderConfig) -> Any:
    """Return timm's norm with the encoder's eps."""
    from timm.layers import LayerNorm, RmsNorm  # pyright: ignore[reportMissingImports]

    return partial(RmsNorm if config.norm == "rms" else LayerNorm, eps=config.norm_eps)


def vision_transformer(config: EncoderConfig, table: Table) -> Any:
    """Return timm's plain vision transformer."""
    from timm.layers import Mlp, SwiGLU  # pyright: ignore[reportMissingImports]
    from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
        VisionTransformer,
    )

    norm = norm_layer(config)
    return VisionTransformer(
        img_size=(table.rows * config.patch, table.columns * config.patch),
        dynamic_img_size=table.any_grid,
        qkv_bias=config.qkv_bias == "qkv",
        proj_bias=config.bias,
        class_token=config.class_token,
        reg_tokens=config.registers,
        no_embed_class=True,
        pre_norm=config.embedding_norm == "tokens",
        embed_norm_layer=norm if config.embedding_norm == "patches" else None,
        norm_layer=norm,
        act_layer=config.activation,
        mlp_layer=SwiGLU if config.gated else Mlp,
        fc_norm=False,
        **sizes(config),
    )


def eva(config: EncoderConfig) -> Any:
    """Return timm's DINOv3.

    Raises: NoCounterpartError for biases or an activation that it does not have.
    """
    from timm.models.eva import Eva  # pyright: ignore[reportMissingImports]

    wanted = "silu" if config.gated else "gelu"
    if config.qkv_bias == "qkv" or not config.bias or config.activation != wanted:
        raise NoCounterpartError("timm's DINOv3 has not these biases, or another activation")
    return Eva(
        qkv_bias=config.qkv_bias == "qv",
        swiglu_mlp=config.gated,
        swiglu_align_to=1,
        num_reg_tokens=config.registers,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=config.rotary.base if isinstance(config.rotary, Rotary) else 0.0,
        rope_rotate_half=True,
        use_fc_norm=False,
        dynamic_img_size=True,
        norm_layer=norm_layer(config),
        **sizes(config),
    )


def naflex(config: EncoderConfig, table: Table) -> Any:
    """Return timm's SigLIP2 NaFlex."""
    from timm.models.naflexvit import (  # pyright: ignore[reportMissingImports]
        NaFlexVit,
        NaFlexVitCfg,
    )

    told = {name: value for name, value in sizes(config).items() if name != "num_classes"}
    settings = NaFlexVitCfg(
        act_layer=config.activation,
        norm_layer=norm_layer(config),
        pos_embed_grid_size=(table.rows, table.columns),
        pos_embed_interp_mode="bilinear",
        **told,
    )
    return NaFlexVit(settings, num_classes=0)


def described(model: nn.Module) -> str:
    """Return timm's version and the class of a model."""
    return f"timm {version_of('timm')} {type(model).__name__}"
