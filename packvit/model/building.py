"""Build an encoder that a checkpoint describes, and fill in its weights."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from packvit.checkpoints.description import Described
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import EMBEDDING
from packvit.checkpoints.parameters import Read, take
from packvit.checkpoints.rules import permute_patches
from packvit.model.device import find_device, find_dtype
from packvit.model.memory import check_room
from packvit.model.options import LoadOptions

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def build(
    kind: Callable[..., AnyModule],
    described: Described,
    checkpoint: Checkpoint,
    options: LoadOptions,
) -> tuple[AnyModule, Read]:
    """Return an encoder of the class `kind`, all its parameters filled in, and what was read.

    From a checkpoint without numbers (`outlines.py`), parameters have shapes and take no memory.

    Raises: CheckpointError naming everything that is missing, misshapen or unexpected, or if the
    weights do not fit in memory; ValueError for an unknown device or dtype.
    """
    device = find_device(options.device)
    dtype = find_dtype(options.dtype, device)

    def place(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty((), dtype=dtype, device=device).expand(tensor.shape)
        return tensor.to(device, dtype, copy=True)  # which is a view of the mapped file

    with torch.inference_mode(False):  # so that it can be trained, wherever it is loaded
        with torch.device("meta"):
            model = kind(
                described.config,
                described.images,
                attention=options.attention,
                patch_order=options.patch_order,
                positions=options.positions,
            )
        numbers = sum(parameter.numel() for parameter in model.parameters())
        check_room(checkpoint.name, numbers * dtype.itemsize, device)
        found = take(model.state_dict(), checkpoint, described.layout, place)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # tensors were cast on the streams of other threads
        embedding = permute_patches(found.state[EMBEDDING], options.patch_order).contiguous()
        model.load_state_dict({**found.state, EMBEDDING: embedding}, assign=True)
    return model.eval(), found
