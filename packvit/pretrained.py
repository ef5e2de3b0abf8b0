"""A checkpoint's files to an encoder's configuration and parameters, and back."""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from packvit import checkpoints, weights
from packvit.checkpoints import Checkpoint, CheckpointError
from packvit.config import EncoderConfig, ImageConfig, PatchOrder
from packvit.family import Family, Layout
from packvit.preprocessing import image_config_from
from packvit.weights import permute_patches

LayoutName = Literal["transformers", "original"]

EMBEDDING = "embeddings.patches.weight"  # the one weight that depends on the order of a patch


class Described(NamedTuple):
    """What a checkpoint says it is."""

    layout: Layout
    config: EncoderConfig
    images: ImageConfig


def describe(family: Family, checkpoint: Checkpoint) -> Described:
    """Return a checkpoint's layout and configurations, told by its config.json and its names.

    Raises: CheckpointError if it is not one of `family`.
    """
    if not family.claims(checkpoint.config):
        raise CheckpointError(
            f'{checkpoint.name} is of model type "{checkpoint.config.get("model_type")}", but '
            f"{family.name} is {' or '.join(family.model_types)}. "
            "packvit.load finds the right family by itself."
        )
    layout = family.layout(checkpoint.tensors)
    config = layout.read(checkpoint.config, checkpoint.tensors)
    try:
        images = image_config_from(checkpoint.preprocessor, family.images(config))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return Described(layout, config, images)


def read(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    patch_order: PatchOrder,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a tensor for every one of our parameters, and those that are only carried along.

    Raises: CheckpointError naming everything that is missing, misshapen or unexpected.
    """
    state = weights.load(
        {name: tensor.shape for name, tensor in parameters.items()},
        checkpoint.tensors,
        layout.rules,
        unread=lambda name: name in layout.carried.values() or name.split(".")[0] in layout.skipped,
        # A copy always: what is read from a file is a view of the mapped file.
        place=lambda tensor: tensor.to(device, dtype, copy=True),
    )
    state[EMBEDDING] = permute_patches(state[EMBEDDING], patch_order).contiguous()
    tensors = checkpoint.tensors
    carried = {
        label: tensors[name].clone() for label, name in layout.carried.items() if name in tensors
    }
    return state, carried


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
    chosen = family.writable(layout, state)
    ours = {**state, EMBEDDING: permute_patches(state[EMBEDDING], patch_order, back=True)}
    dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    checkpoints.write(
        folder,
        config=chosen.write(config) | {"dtype": dtype},
        tensors=weights.store(ours, chosen.rules)
        | {chosen.carried[label]: tensor for label, tensor in carried.items()},
        preprocessor=preprocessor,
    )


def in_memory(model: nn.Module) -> Checkpoint:
    """Return a transformers model as the checkpoint that it would be saved as.

    Raises: CheckpointError if it has no configuration to go by.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise CheckpointError(
            f"from_transformers takes a model of transformers, not a {type(model).__name__}."
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Checkpoint(type(model).__name__, None, config.to_dict(), None, tensors)
