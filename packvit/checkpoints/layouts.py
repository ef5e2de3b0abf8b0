"""What a family of encoders is: the layouts its checkpoints come in, and how to tell them.

A family is a frozen value; its file in `families/` fills one in. Nothing here guesses: a layout is
told by a tensor that only it has, and what no layout explains is an error that names it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packvit.checkpoints.files import CheckpointError
from packvit.checkpoints.rules import Rule, layers, prefixed, rename, reshape
from packvit.config import (
    CLIP_STATISTICS,
    Activation,
    EncoderConfig,
    ImageConfig,
    ShortestEdge,
    Table,
)

Json = Mapping[str, Any]

ACTIVATION_NAMES: dict[str, Activation] = {  # transformers' words to ours
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a family's checkpoints name and shape their tensors."""

    name: str  # as `save_pretrained(layout=...)` and `packvit convert --layout` take it
    marker: str  # a tensor that tells this layout from the family's others
    rules: tuple[Rule, ...]
    read: Callable[[Json, Collection[str]], EncoderConfig]  # config.json, names of the tensors
    write: Callable[[EncoderConfig], dict[str, Any]]  # config.json
    # Tensors kept for `save_pretrained` and used by nothing: our label to the layout's name.
    carried: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # first parts of names that belong to another tower


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of checkpoint within a family, as a small random model of transformers shows it."""

    name: str
    model: str  # the class in transformers
    entries: Json = field(default_factory=dict)  # of its configuration, beside the sizes


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers calls a family's models: for `packvit verify`, and nothing else."""

    variants: tuple[Variant, ...]
    processor: str  # the class in transformers that prepares images
    processor_options: Json = field(default_factory=dict)  # where the class's defaults are others
    interpolates: bool = False  # whether the models take `interpolate_pos_encoding`

    @property
    def models(self) -> frozenset[str]:
        """The classes that a config.json of this family names as its architecture."""
        return frozenset(variant.model for variant in self.variants)


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints that share an architecture and a naming of weights."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    layouts: tuple[Layout, ...]
    images: Callable[[EncoderConfig], ImageConfig]  # where the checkpoint says nothing
    checkpoints: tuple[str, ...]  # published, by their names on the hub
    reference: Reference

    def claims(self, config: Json) -> bool:
        """Return whether a checkpoint with this config.json is one of ours."""
        return config.get("model_type") in self.model_types

    def layout(self, names: Collection[str]) -> Layout:
        """Return the layout whose marker is among the tensors' names.

        Raises: CheckpointError if none is, or more than one.
        """
        found = [layout for layout in self.layouts if layout.marker in names]
        if len(found) != 1:
            markers = ", ".join(f"{layout.marker} ({layout.name})" for layout in self.layouts)
            raise CheckpointError(
                f"This is no {self.name} vision checkpoint: of the tensors that tell its layouts "
                f"apart it must hold exactly one, and it holds {len(found)}: {markers}."
            )
        return found[0]

    def writable(self, name: str, parameters: Collection[str]) -> Layout:
        """Return the layout called `name` that has a word for every one of our `parameters`.

        Raises: ValueError listing the names there are.
        """
        for layout in self.layouts:
            if layout.name == name and all(
                any(rule.names(ours) for rule in layout.rules) for ours in parameters
            ):
                return layout
        known = ", ".join(dict.fromkeys(f'"{layout.name}"' for layout in self.layouts))
        raise ValueError(f'{self.name} has no layout "{name}". Choose one of: {known}.')


def entry(config: Json, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """Return an entry of config.json, checked for its kind.

    Raises: CheckpointError if it is absent and has no default, or is of another kind.
    """
    value = config.get(name, default)
    if kind is float and type(value) is int:
        value = float(value)  # JSON writes 100.0 as 100 as well
    number = isinstance(value, int | float)
    if (
        value is None
        or isinstance(value, bool) is not (kind is bool)
        or not isinstance(value, kind)
        or (number and not 0 <= value < 1e9)  # nor is NaN
    ):
        raise CheckpointError(
            f'config.json says "{name}": {value!r}, which describes no encoder that we know.'
        )
    return value


# How CLIP named the layers of a block, which SigLIP and SigLIP2 took over: ours to theirs.
CLIP_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}

# SigLIP's pooling head, the same in both generations.
PROBE_HEAD = (
    reshape("head.probe", "head.probe", 1, 1),
    rename("head.qkv.weight", "head.attention.in_proj_weight"),
    rename("head.qkv.bias", "head.attention.in_proj_bias"),
    *layers(
        "head.",
        "head.",
        {
            "out": "attention.out_proj",
            "norm": "layernorm",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
        },
    ),
)

SIZES = {  # ours to transformers' words
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}


def tower(config: Json) -> Json:
    """Return the part of config.json that is about images, where it has two towers.

    Raises: CheckpointError if that part is no object.
    """
    return entry(config, "vision_config", dict) if "vision_config" in config else config


def beside_text(
    layout: Layout,
    skipped: tuple[str, ...],
    *,
    prefix: str = "vision_model.",
    projection: str | None = None,
) -> Layout:
    """Return a layout as it is written in a file with two towers: behind `prefix`.

    `projection` names the matrix into the space that both towers share, where there is one.
    """
    shared = (rename("projection.weight", projection),) if projection else ()
    return replace(
        layout,
        marker=prefix + layout.marker,
        rules=(*prefixed(layout.rules, prefix), *shared),
        carried={label: prefix + name for label, name in layout.carried.items()},
        skipped=skipped,
    )


def clip_images(config: EncoderConfig) -> ImageConfig:
    """Return the preprocessing of CLIP, which AIMv2 took over: a square from the centre.

    An encoder that takes any grid takes images as they are.
    """
    table = config.positions
    side = table.rows * config.patch if isinstance(table, Table) else 0
    sizing = ShortestEdge(side, crop=(side, side)) if side else None
    return ImageConfig(config.patch, *CLIP_STATISTICS, "bicubic", sizing)


def sizes(config: Json, **defaults: int) -> dict[str, Any]:
    """Return the sizes in config.json, which leaves out what equals its class's `defaults`.

    Raises: CheckpointError for one that is no number, or for channels other than three.
    """
    channels = entry(config, "num_channels", int, 3)
    if channels != 3:
        raise CheckpointError(f'config.json says "num_channels": {channels}; we know 3, for RGB.')
    found = {ours: entry(config, SIZES[ours], int, default) for ours, default in defaults.items()}
    if 0 in found.values():
        raise CheckpointError(f"config.json says {found}; every size is 1 or more.")
    return found


def write_sizes(config: EncoderConfig) -> dict[str, Any]:
    """Write the sizes, the activation and the patch as transformers' config.json words them."""
    return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {
        "num_channels": 3,
        "patch_size": config.patch,
        "hidden_act": next(t for t, ours in ACTIVATION_NAMES.items() if ours == config.activation),
    }


def agreed(config: Json, *names: str) -> bool:
    """Return the one answer that config.json gives to several yes-or-no entries, absent ones aside.

    Raises: CheckpointError if they differ, which no published checkpoint's do.
    """
    answers = {name: entry(config, name, bool) for name in names if name in config}
    if len(set(answers.values())) > 1:
        raise CheckpointError(f"config.json says {answers}; we know encoders where they agree.")
    return next(iter(answers.values()), False)


def activation(config: Json, default: str) -> Activation:
    """Return our name of config.json's hidden_act.

    Raises: CheckpointError for one that no published encoder has.
    """
    name = entry(config, "hidden_act", str, default)
    if name not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise CheckpointError(f'config.json says "hidden_act": "{name}"; we know {known}.')
    return ACTIVATION_NAMES[name]


def square(config: Json, name: str, default: int | None = None) -> int:
    """Return a size that config.json gives as one number, or as two equal ones.

    Raises: CheckpointError for anything else.
    """
    value = config.get(name, default)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return entry({name: value[0]}, name, int)
    return entry(config, name, int, default) or entry({}, name, int)  # 0 is no size
