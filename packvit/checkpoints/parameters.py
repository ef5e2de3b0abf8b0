"""A checkpoint's tensors to an encoder's parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from packvit.checkpoints import rules as weights
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import EMBEDDING, Layout
from packvit.checkpoints.rules import permute_patches
from packvit.config import PatchOrder


class Read(NamedTuple):
    """What a checkpoint's tensors are to us."""

    state: dict[str, Tensor]  # our parameters
    carried: dict[str, Tensor]  # by our labels: kept for writing, and used by nothing
    skipped: tuple[str, ...]  # the checkpoint's names of those that belong to another tower


def fill_parameters(
    model: nn.Module,
    checkpoint: Checkpoint,
    layout: Layout,
    patch_order: PatchOrder,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Fill in every parameter of a model that has none yet; return what was carried and skipped.

    Raises: CheckpointError naming everything that is missing, misshapen or unexpected.
    """
    # A copy always: what is read from a file is a view of the mapped file.
    found = take(
        model.state_dict(), checkpoint, layout, lambda tensor: tensor.to(device, dtype, copy=True)
    )
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)  # tensors were cast on the streams of other threads
    embedding = permute_patches(found.state[EMBEDDING], patch_order).contiguous()
    model.load_state_dict({**found.state, EMBEDDING: embedding}, assign=True)
    return found.carried, found.skipped


def take(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    place: Callable[[Tensor], Tensor] | None,
) -> Read:
    """Share out a checkpoint's tensors; without `place` each one stays as its file has it."""
    tensors, carried = checkpoint.tensors, layout.carried

    state = weights.load(
        {name: tensor.shape for name, tensor in parameters.items()},
        tensors,
        layout.rules,
        unread=lambda name: name in carried.values() or layout.skips(name),
        place=place,
    )
    read = {name for ours in parameters for name in weights.find(ours, layout.rules)[1]}
    unread = {label: name for label, name in carried.items() if name in tensors.keys() - read}
    return Read(
        state,
        {label: tensors[name].clone() for label, name in unread.items()},
        tuple(name for name in sorted(tensors) if layout.skips(name)),
    )
