"""The table of text towers: how config.json describes one, and how its tensors are named."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from packvit.checkpoints.config_json import Json, activation, agreed, entry, sizes
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.layouts import named_type
from packvit.checkpoints.rules import Rule, layers, prefixed, rename
from packvit.config import TextConfig
from packvit.families import clip, siglip, siglip2, tipsv2
from packvit.families.aimv2_blocks import APPLE_BLOCKS, TRANSFORMERS_BLOCKS
from packvit.families.clip_siglip import CLIP_BLOCK

BROKEN_END = 2  # what CLIP's first configurations say, whose tokenizers end a text by another id


@dataclass(frozen=True, slots=True)
class TextLayout:
    """One way in which checkpoints name a text tower's tensors."""

    marker: str  # a tensor that tells this layout from those after it
    rules: tuple[Rule, ...]
    unread: tuple[str, ...]  # what names of the image tower's tensors begin with, or whole names

    def holds(self, name: str) -> bool:
        """Return whether this layout has a word for our parameter `name`."""
        return any(rule.ours == name for rule in self.rules)


@dataclass(frozen=True, slots=True)
class TextTower:
    """Text towers that share an architecture."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    layouts: tuple[TextLayout, ...]
    alone_types: tuple[str, ...]  # of the tower saved by itself
    alone: tuple[TextLayout, ...]
    read: Callable[[Json], TextConfig]
    tokenizer: str  # transformers' class, where the checkpoint names none
    space: str  # the image encoder's output that texts compare with
    checkpoints: tuple[str, ...]  # published, by their names on the hub

    def layout(self, names: Collection[str], config: Json) -> TextLayout:
        """Return the first layout whose marker is among the tensors' names, or behind one prefix.

        Raises: CheckpointError if none is, or behind more than one.
        """
        known = self.alone if named_type(config) in self.alone_types else self.layouts
        found: list[tuple[TextLayout, str]] = []
        for layout in known:
            end = f".{layout.marker}"
            held = [name for name in names if name == layout.marker or name.endswith(end)]
            found = found or [(layout, name.removesuffix(layout.marker)) for name in held]
        if len(found) != 1:
            markers = " or ".join(layout.marker for layout in known)
            raise CheckpointError(
                f"This {self.name} checkpoint holds {len(found) or 'no'} text towers, told by "
                f"{markers}, but load_text takes one. packvit.load reads its image tower."
            )
        [(layout, prefix)] = found
        return replace(
            layout,
            rules=prefixed(layout.rules, prefix),
            unread=tuple(prefix + name for name in layout.unread),
        )


def inner(config: Json) -> Json:
    """Return the part of config.json that is about texts, where it has two towers."""
    return entry(config, "text_config", dict) if "text_config" in config else config


def read_clip(config: Json) -> TextConfig:
    """Read CLIP's config.json; `text_config_dict` replaces `text_config`, as in transformers."""
    text = config.get("text_config_dict") or inner(config)
    end = entry(text, "eos_token_id", int, 49407)
    return TextConfig(
        **sizes(text, width=512, layers=12, heads=8, mlp_width=2048),
        vocabulary=entry(text, "vocab_size", int, 49408),
        positions=entry(text, "max_position_embeddings", int, 77),
        norm="layer",
        norm_eps=entry(text, "layer_norm_eps", float, 1e-5),
        activation=activation(text, "quick_gelu"),
        pool="largest" if end == BROKEN_END else "end",
        end=end,
        projection=entry(config, "projection_dim", int, 512),
    )


def read_siglip(config: Json) -> TextConfig:
    """Read the config.json of SigLIP and of both kinds of SigLIP2."""
    text = inner(config)
    width = sizes(text, width=768, layers=12, heads=12, mlp_width=3072)
    return TextConfig(
        **width,
        vocabulary=entry(text, "vocab_size", int, 32000),
        positions=entry(text, "max_position_embeddings", int, 64),
        norm="layer",
        norm_eps=entry(text, "layer_norm_eps", float, 1e-6),
        activation=activation(text, "gelu_pytorch_tanh"),
        causal=False,
        pool="last",
        padded=True,
        head=entry(text, "projection_size", int, width["width"]),
        logit_bias=True,
    )


def read_aimv2(config: Json) -> TextConfig:
    """Read the config.json of AIMv2's LiT checkpoint in either layout."""
    text = inner(config)
    bias = agreed(text, "qkv_bias", "mlp_bias", "use_bias")
    return TextConfig(
        **sizes(text, width=768, layers=12, heads=6, mlp_width=2048),
        vocabulary=entry(text, "vocab_size", int, 49408),
        positions=entry(
            text, "max_position_embeddings", int, entry(text, "max_context_length", int, 77)
        ),
        norm="rms",
        norm_eps=entry(text, "rms_norm_eps", float, 1e-5),
        activation=activation(text, "silu"),
        gated=True,
        bias=bias,
        qkv_bias="qkv" if bias else "",
        end=entry(text, "eos_token_id", int, 49407),
        projection=entry(config, "projection_dim", int, 512),
        most_scale=entry(config, "max_logit_scale", float, 100.0),
    )


def read_tipsv2(config: Json) -> TextConfig:
    """Read the config.json of TIPSv2, with both towers or the text's alone.

    Raises: CheckpointError, also for a mean that is not over the tokens alone.
    """
    text = inner(config)
    if entry(text, "pooling_epsilon", float, 1e-8) > 1e-6:
        raise CheckpointError('config.json says "pooling_epsilon" above 1e-6; packvit knows means.')
    temperature = entry(config, "temperature_init_value", float, 0.005065968260169029)
    return TextConfig(
        **sizes(text, width=768, layers=12, heads=12, mlp_width=3072),
        vocabulary=entry(text, "vocab_size", int, 32000),
        positions=entry(text, "max_position_embeddings", int, 64),
        norm="layer",
        norm_eps=entry(text, "layer_norm_eps", float, 1e-5),
        activation=activation(text, "relu"),
        causal=False,
        pool="mean",
        sinusoids=True,
        scaled_tokens=entry(text, "scale_sqrt_depth", bool, True),
        first_scale=-math.log(temperature) if temperature else None,
    )


def temperature(ours: str, theirs: str) -> Rule:
    """The logarithm of a scale, of which the checkpoint keeps the inverse.

    A round trip may change the last bits of float32.
    """
    return Rule(
        ours,
        (theirs,),
        lambda t: -t[0].double().log().float().reshape(1),
        lambda t: [(-t.double()).exp().float().reshape(())],
    )


def number(ours: str, theirs: str) -> Rule:
    """A vector of one number, which the checkpoint keeps as a scalar."""
    return Rule(ours, (theirs,), lambda t: t[0].reshape(1), lambda t: [t.reshape(())])


EMBEDDINGS = (
    rename("embeddings.tokens.weight", "embeddings.token_embedding.weight"),
    rename("embeddings.positions", "embeddings.position_embedding.weight"),
)
OLD = "embeddings.position_ids"  # of older files, used by nothing
POSITION_IDS = f"text_model.{OLD}"
CLIP_RULES = (
    *EMBEDDINGS,
    *layers("encoder.layers.{i}.", "encoder.layers.{i}.", CLIP_BLOCK),
    *layers("", "", {"norm": "final_layer_norm"}),
)
PROJECTED = (
    rename("projection.weight", "text_projection.weight"),
    number("logit_scale", "logit_scale"),
)

CLIP = TextTower(
    name="CLIP",
    model_types=("clip",),
    layouts=(
        TextLayout(
            "text_model.final_layer_norm.weight",
            (*prefixed(CLIP_RULES, "text_model."), *PROJECTED),
            ("vision_model", "visual_projection", POSITION_IDS),
        ),
    ),
    alone_types=("clip_text_model",),
    alone=(
        TextLayout(
            "text_projection.weight",
            (*prefixed(CLIP_RULES, "text_model."), PROJECTED[0]),
            (POSITION_IDS,),
        ),
        TextLayout("final_layer_norm.weight", CLIP_RULES, (OLD,)),
    ),
    read=read_clip,
    tokenizer="CLIPTokenizer",
    space="projected",
    checkpoints=clip.FAMILY.checkpoints,
)
SIGLIP_RULES = (*CLIP_RULES, *layers("", "", {"head": "head"}))
SIGLIP_LAYOUT = TextLayout(
    "text_model.final_layer_norm.weight",
    (
        *prefixed(SIGLIP_RULES, "text_model."),
        rename("logit_scale", "logit_scale"),
        rename("logit_bias", "logit_bias"),
    ),
    ("vision_model", POSITION_IDS),
)
SIGLIP = TextTower(
    name="SigLIP",
    model_types=("siglip",),
    layouts=(SIGLIP_LAYOUT,),
    alone_types=("siglip_text_model",),
    alone=(TextLayout("final_layer_norm.weight", SIGLIP_RULES, (OLD,)),),
    read=read_siglip,
    tokenizer="SiglipTokenizer",
    space="pooled",
    checkpoints=siglip.FAMILY.checkpoints,
)
SIGLIP2 = replace(
    SIGLIP,
    name="SigLIP2 NaFlex",
    model_types=("siglip2",),
    alone_types=("siglip2_text_model",),
    tokenizer="Siglip2Tokenizer",
    checkpoints=siglip2.FAMILY.checkpoints,
)
AIMV2 = TextTower(
    name="AIMv2 LiT",
    model_types=("aimv2",),
    layouts=(
        TextLayout(
            "text_model.rms_norm.weight",
            (*prefixed((*EMBEDDINGS, *TRANSFORMERS_BLOCKS), "text_model."), *PROJECTED),
            ("vision_model", "visual_projection", POSITION_IDS),
        ),
        TextLayout(
            "text_encoder.trunk.post_trunk_norm.weight",
            (
                rename(
                    "embeddings.tokens.weight", "text_encoder.preprocessor.text_embedding.weight"
                ),
                rename("embeddings.positions", "text_encoder.preprocessor.positional_embedding"),
                *prefixed(APPLE_BLOCKS, "text_encoder."),
                rename("projection.weight", "text_projector.weight"),
                number("logit_scale", "log_logit_scale"),
            ),
            ("image_encoder", "image_projector"),
        ),
    ),
    alone_types=("aimv2_text_model",),
    alone=(TextLayout("rms_norm.weight", (*EMBEDDINGS, *TRANSFORMERS_BLOCKS), (OLD,)),),
    read=read_aimv2,
    tokenizer="CLIPTokenizer",
    space="projected",
    checkpoints=("apple/aimv2-large-patch14-224-lit",),
)
TIPSV2_BLOCK, OURS = "transformer.resblocks.{i}.", "encoder.layers.{i}."
TIPSV2_RULES = (
    rename("embeddings.tokens.weight", "token_embedding.weight"),
    *layers(
        OURS,
        TIPSV2_BLOCK,
        {
            "attention_norm": "ln_1",
            "attention.out": "attn.out_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
    ),
    rename(f"{OURS}attention.qkv.weight", f"{TIPSV2_BLOCK}attn.in_proj_weight"),
    rename(f"{OURS}attention.qkv.bias", f"{TIPSV2_BLOCK}attn.in_proj_bias"),
    *layers("", "", {"norm": "ln_final"}),
)
TIPSV2 = TextTower(
    name="TIPSv2",
    model_types=("tipsv2",),
    layouts=(
        TextLayout(
            "text_encoder.ln_final.weight",
            (
                *prefixed(TIPSV2_RULES, "text_encoder."),
                temperature("logit_scale", "temperature"),
            ),
            ("vision_encoder",),
        ),
    ),
    alone_types=("tipsv2_text_model",),
    alone=(TextLayout("ln_final.weight", TIPSV2_RULES, ()),),
    read=read_tipsv2,
    tokenizer="Tipsv2Tokenizer",
    space="pooled",
    checkpoints=tipsv2.FAMILY.checkpoints,
)

TEXT_TOWERS = (CLIP, SIGLIP, SIGLIP2, AIMV2, TIPSV2)
