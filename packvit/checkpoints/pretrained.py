"""A checkpoint's files to an encoder's configuration and parameters, and back."""

import os
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import rules as weights
from packvit.checkpoints.files import Checkpoint, CheckpointError
from packvit.checkpoints.layouts import Family, Layout
from packvit.checkpoints.processors import image_config_from
from packvit.checkpoints.rules import permute_patches
from packvit.config import EncoderConfig, ImageConfig, PatchOrder

LayoutName = Literal["transformers", "original"]

EMBEDDING = "embeddings.patches.weight"  # the one weight that depends on the order of a patch


class Described(NamedTuple):
    """What a checkpoint says it is."""

    layout: Layout
    config: EncoderConfig
    images: ImageConfig


def describe_checkpoint(family: Family, checkpoint: Checkpoint) -> Described:
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
    check_sizes(config, checkpoint)
    file = checkpoint.settings_file
    try:
        images = image_config_from(checkpoint.preprocessor, family.images(config), file=file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} of {checkpoint.name} holds an entry of another kind than its processor's "
            f"({error}). Compare it with the published one."
        ) from error
    numbers = (*images.mean, *images.std)
    if not all(map(isfinite, numbers)) or min(images.std) <= 0:
        raise CheckpointError(
            f"{file} says image_mean {images.mean} and image_std {images.std}, but they must be "
            "finite, and the latter above 0."
        )
    return Described(layout, config, images)


def check_sizes(config: EncoderConfig, checkpoint: Checkpoint) -> None:
    """Refuse sizes that no encoder can have, before anything is built by them.

    Raises: CheckpointError saying which.
    """
    if config.width % config.heads or config.head_dim % 2:
        raise CheckpointError(
            f"config.json of {checkpoint.name} says {config.heads} heads for a width of "
            f"{config.width}, which does not part into heads of an even width."
        )
    if config.layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json of {checkpoint.name} says {config.layers} layers, but there are "
            f"{len(checkpoint.tensors)} tensors in all."
        )


class Converted(NamedTuple):
    """A checkpoint in another layout."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    preprocessor: Mapping[str, Any] | None
    skipped: tuple[str, ...]  # names of the tensors that were left behind, of another tower


class Read(NamedTuple):
    """What a checkpoint's tensors are to us."""

    state: dict[str, Tensor]  # our parameters
    carried: dict[str, Tensor]  # by our labels: kept for writing, and used by nothing
    skipped: tuple[str, ...]  # the checkpoint's names of those that belong to another tower


def read(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    patch_order: PatchOrder,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Read:
    """Return a tensor for every one of our parameters, on `device` and in `dtype`.

    Raises: CheckpointError naming everything that is missing, misshapen or unexpected.
    """
    # A copy always: what is read from a file is a view of the mapped file.
    found = take(parameters, checkpoint, layout, lambda t: t.to(device, dtype, copy=True))
    embedding = permute_patches(found.state[EMBEDDING], patch_order).contiguous()
    return found._replace(state={**found.state, EMBEDDING: embedding})


def take(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    place: Callable[[Tensor], Tensor] | None,
) -> Read:
    """Share out a checkpoint's tensors; without `place` each one stays as its file has it."""
    tensors, carried = checkpoint.tensors, layout.carried

    def skipped(name: str) -> bool:
        return name.split(".")[0] in layout.skipped

    state = weights.load(
        {name: tensor.shape for name, tensor in parameters.items()},
        tensors,
        layout.rules,
        unread=lambda name: name in carried.values() or skipped(name),
        place=place,
    )
    read = {name for ours in parameters for name in weights.find(ours, layout.rules)[1]}
    unread = {label: name for label, name in carried.items() if name in tensors.keys() - read}
    return Read(
        state,
        {label: tensors[name].clone() for label, name in unread.items()},
        tuple(name for name in sorted(tensors) if skipped(name)),
    )


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
    return chosen.write(config) | {"dtype": dtype}, kept | weights.store(state, chosen.rules)


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


def in_memory(model: nn.Module) -> Checkpoint:
    """Return a transformers model as the checkpoint that it would be saved as.

    Raises: CheckpointError if it has no configuration to go by; ImportError without transformers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not isinstance(model, nn.Module):
        raise CheckpointError(
            f"from_transformers takes a model of transformers, not a {type(model).__name__}."
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Checkpoint(type(model).__name__, None, config.to_dict(), None, as_saved(model, tensors))


def as_saved(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under the names that `save_pretrained` would write.

    Names in memory change with the version of transformers; those in files do not.

    Raises: ImportError with the line that installs transformers.
    Source: transformers 5.17 and 5.24, `PreTrainedModel.save_pretrained`.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise ImportError(
            "from_transformers needs the transformers library, 5.17 or newer: "
            "pip install 'packvit[reference]'"
        ) from error
    return (
        revert_weight_conversion(model, tensors) if isinstance(model, PreTrainedModel) else tensors
    )
