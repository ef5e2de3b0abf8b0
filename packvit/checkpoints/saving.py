"""An encoder's parameters to a checkpoint, in any layout of its family."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import rules as weights
from packvit.checkpoints.description import Described
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import EMBEDDING, Family, LayoutName
from packvit.checkpoints.parameters import take
from packvit.checkpoints.rules import permute_patches
from packvit.config import EncoderConfig, PatchOrder


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
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of an encoder in one of its family's layouts.

    Raises: ValueError for a layout that the family does not have.
    """
    chosen = family.writable(layout, state)
    dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    kept = {chosen.carried[label]: tensor for label, tensor in carried.items()}
    return chosen.write(config) | {"dtype": dtype}, kept | weights.store(
        state, weights.bind(chosen.rules, config.heads)
    )


def write(
    folder: str | os.PathLike[str],
    family: Family,
    layout: LayoutName,
    config: EncoderConfig,
    state: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    *,
    patch_order: PatchOrder,
    preprocessor: Mapping[str, Any] | None,
) -> None:
    """Write an encoder as a checkpoint of `family` in one of its layouts.

    Raises: ValueError for a layout that the family does not have.
    """
    ours = {**state, EMBEDDING: permute_patches(state[EMBEDDING], patch_order, back=True)}
    written, tensors = lay_out(family, layout, config, ours, carried)
    checkpoints.write(folder, config=written, tensors=tensors, preprocessor=preprocessor)


def convert(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    family: Family,
    described: Described,
    layout: LayoutName,
) -> Converted:
    """Return a checkpoint in another layout, every number and dtype as its file has it.

    Raises: ValueError for a layout that the family does not have; CheckpointError as `read`, and
    for tensors of different dtypes that are one of ours.
    """
    found = take(parameters, checkpoint, described.layout, place=None)
    config, tensors = lay_out(family, layout, described.config, found.state, found.carried)
    return Converted(config, tensors, checkpoint.preprocessor, found.skipped)
