"""An encoder's parameters to a checkpoint, in any layout of its family."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints.config_json import Json, tower
from packvit.checkpoints.description import Described
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import EMBEDDING, Family, Layout, LayoutName
from packvit.checkpoints.parameters import store, take
from packvit.checkpoints.rules import bind, permute_patches
from packvit.config import EncoderConfig, PatchOrder

# What config.json says about the class and the numbers of the tensors beside it.
ABOUT_TENSORS = frozenset(
    (
        *("architectures", "auto_map", "dtype", "model_type", "quantization_config"),
        *("torch_dtype", "_name_or_path"),
    )
)


class Origin(NamedTuple):
    """The config.json that an encoder was loaded from, and the configuration read from it."""

    entries: Json
    config: EncoderConfig


class Converted(NamedTuple):
    """A checkpoint in another layout."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    preprocessor: Mapping[str, Any] | None
    skipped: tuple[str, ...]  # names of the tensors that were left behind, of another tower


def lay_out(
    family: Family,
    layout: LayoutName,
    config: EncoderConfig,
    state: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    origin: Origin | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of an encoder in one of its family's layouts.

    Raises: ValueError for a layout that the family does not have.
    """
    chosen = family.writable(layout, state, config)
    dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    kept = {chosen.carried[label]: tensor for label, tensor in carried.items()}
    tensors = kept | store(state, bind(chosen.rules, config.heads))
    written = chosen.write(config)
    if origin is not None:
        written = with_entries(written, origin, chosen, config, tensors)
    return written | {"dtype": dtype}, tensors


def with_entries(
    written: Json, origin: Origin, layout: Layout, config: EncoderConfig, names: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json with the entries of the one that was read.

    So the reference reads what it read before, also entries that packvit does not use, such as
    dropout. An entry is replaced if the encoder was changed since, or if the old one would
    describe another encoder.
    """
    both = "vision_config" in written
    entries = origin.entries if both else tower(origin.entries)
    before = layout.write(replace(origin.config, projection=config.projection))

    def is_right(made: Json) -> bool:
        try:
            return layout.read(made, names) == config
        except CheckpointError:  # an old entry need not go with the new ones
            return False

    return merged(written, before, entries, is_right)


def merged(
    written: Json, before: Json, entries: Json, is_right: Callable[[Json], bool]
) -> dict[str, Any]:
    """Return `written` with every one of `entries` that is right and was not changed."""
    made = dict(written)
    for name, value in entries.items():
        old = made.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            made[name] = merged(
                old, before[name], value, lambda part, name=name: is_right(made | {name: part})
            )
        elif (
            name not in ABOUT_TENSORS
            and old == before.get(name)
            and is_right({**made, name: value})
        ):
            made[name] = value
    return made


def write(
    folder: str | os.PathLike[str],
    family: Family,
    layout: LayoutName,
    config: EncoderConfig,
    state: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    *,
    origin: Origin | None,
    patch_order: PatchOrder,
    preprocessor: Mapping[str, Any] | None,
) -> None:
    """Write an encoder as a checkpoint of `family` in one of its layouts.

    Raises: ValueError for a layout that the family does not have.
    """
    ours = {**state, EMBEDDING: permute_patches(state[EMBEDDING], patch_order, back=True)}
    written, tensors = lay_out(family, layout, config, ours, carried, origin)
    checkpoints.write(folder, config=written, tensors=tensors, preprocessor=preprocessor)


def convert(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    family: Family,
    described: Described,
    layout: LayoutName,
) -> Converted:
    """Return a checkpoint in another layout, without changing any number or dtype.

    Raises: ValueError for a layout that the family does not have; CheckpointError as `read`, and
    for tensors of different dtypes that are one of ours.
    """
    found = take(parameters, checkpoint, described.layout, place=None)
    origin = Origin(checkpoint.config, described.config)
    config, tensors = lay_out(family, layout, described.config, found.state, found.carried, origin)
    return Converted(config, tensors, checkpoint.preprocessor, found.skipped)
