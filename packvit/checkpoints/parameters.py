"""A checkpoint's tensors to an encoder's parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from packvit.checkpoints import rules as weights
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import Layout


class Read(NamedTuple):
    """What a checkpoint's tensors are to us."""

    state: dict[str, Tensor]  # our parameters
    carried: dict[str, Tensor]  # by our labels: kept for writing, and used by nothing
    skipped: tuple[str, ...]  # the checkpoint's names of those that belong to another tower


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
