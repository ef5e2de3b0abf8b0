"""Entries of a checkpoint's config.json, each checked for its kind, and how they are written."""

from collections.abc import Mapping
from typing import Any

from packvit.checkpoints.errors import CheckpointError
from packvit.config import Activation, EncoderConfig

Json = Mapping[str, Any]

ACTIVATION_NAMES: dict[str, Activation] = {  # transformers' words to ours
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

SIZES = {  # ours to transformers' words
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "channels": "num_channels",
}


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
            f'config.json says "{name}": {value!r}, which no encoder that packvit knows has.'
        )
    return value


def tower(config: Json) -> Json:
    """Return the part of config.json that is about images, where it has two towers.

    Raises: CheckpointError if that part is not an object.
    """
    return entry(config, "vision_config", dict) if "vision_config" in config else config


def sizes(config: Json, words: Mapping[str, str] = SIZES, **defaults: int) -> dict[str, Any]:
    """Return the sizes in config.json, which leaves out what equals its class's `defaults`.

    `words` are config.json's for ours.

    Raises: CheckpointError for one that is not a number, or for channels other than three.
    """
    channels = entry(config, words["channels"], int, 3)
    if channels != 3:
        raise CheckpointError(
            f'config.json says "{words["channels"]}": {channels}, but it must be 3, for RGB.'
        )
    found = {ours: entry(config, words[ours], int, default) for ours, default in defaults.items()}
    if 0 in found.values():
        raise CheckpointError(f"config.json says {found}; every size is 1 or more.")
    return found


def write_sizes(config: EncoderConfig, words: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """Write the sizes, the activation and the patch as transformers' config.json words them."""
    channels = words["channels"]
    found = {theirs: getattr(config, o) for o, theirs in words.items() if theirs != channels}
    return found | {
        channels: 3,
        "patch_size": config.patch,
        "hidden_act": next(t for t, ours in ACTIVATION_NAMES.items() if ours == config.activation),
    }


def agreed(config: Json, *names: str) -> bool:
    """Return the one answer that config.json gives to several yes-or-no entries, absent ones aside.

    Raises: CheckpointError if they differ, which no published checkpoint's do.
    """
    answers = {name: entry(config, name, bool) for name in names if name in config}
    if len(set(answers.values())) > 1:
        raise CheckpointError(
            f"config.json says {answers}, but packvit knows only encoders where they agree."
        )
    return next(iter(answers.values()), False)


def activation(config: Json, default: str) -> Activation:
    """Return our name of config.json's hidden_act.

    Raises: CheckpointError for one that no published encoder has.
    """
    name = entry(config, "hidden_act", str, default)
    if name not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise CheckpointError(f'config.json says "hidden_act": "{name}"; packvit knows {known}.')
    return ACTIVATION_NAMES[name]


def axial_base(config: Json) -> float:
    """Return the base of axial rotary positions' frequencies.

    Raises: CheckpointError for positions of another kind.
    """
    rope = entry({"rope_parameters": config.get("rope_parameters") or {}}, "rope_parameters", dict)
    kind = rope.get("rope_type", "axial")
    if kind not in ("axial", "default"):
        raise CheckpointError(f'config.json says "rope_type": "{kind}"; packvit knows "axial".')
    return base(rope, 10000.0)


def base(config: Json, default: float) -> float:
    """Return the base of rotary positions' frequencies.

    Raises: CheckpointError for 0, which would give no numbers.
    """
    theta = entry(config, "rope_theta", float, default)
    if theta == 0:
        raise CheckpointError('config.json says "rope_theta": 0.0, but it must be above 0.')
    return theta


def square(config: Json, name: str, default: int | None = None) -> int:
    """Return a size that config.json gives as one number, or as two equal ones.

    Raises: CheckpointError for anything else.
    """
    value = config.get(name, default)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    size = entry({name: value}, name, int)
    if size == 0:
        raise CheckpointError(f'config.json says "{name}": 0, but every size is 1 or more.')
    return size
