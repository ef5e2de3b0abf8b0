"""From a name or a folder to an encoder; the checkpoint itself says which family it is of."""

import os

import torch

from packvit import checkpoints
from packvit.checkpoints import Checkpoint, CheckpointError
from packvit.config import PatchOrder
from packvit.encoder import Encoder, GridPolicy, Options
from packvit.families import FAMILIES


def load(
    name_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    revision: str | None = None,
    patch_order: PatchOrder = "hwc",
    positions: GridPolicy = "checkpoint",
) -> Encoder:
    """Load an encoder by its name on the hub, or from a folder, and no network then.

    `device` None is CUDA if there is one; `dtype` None is bfloat16 there and float32 elsewhere.
    `attention` names a backend (`packvit info` lists them). `revision` pins a commit, branch or
    tag. `patch_order` "chw" is for callers whose patches are flattened channel first. `positions`
    "interpolate" allows grids that a learned table was not made for.

    Raises: CheckpointError saying what is wrong with the checkpoint; ValueError for an option.
    """
    checkpoint = checkpoints.read(name_or_folder, revision=revision)
    options = Options(device, dtype, attention, patch_order, positions)
    return family_of(checkpoint).from_checkpoint(checkpoint, options)


def family_of(checkpoint: Checkpoint) -> type[Encoder]:
    """Return the class of the one family that claims a checkpoint by its config.json.

    Raises: CheckpointError listing the model types that we know.
    """
    for encoder in FAMILIES:
        if encoder.family.claims(checkpoint.config):
            return encoder
    known = ", ".join(name for encoder in FAMILIES for name in encoder.family.model_types)
    found = checkpoint.config.get("model_type")
    raise CheckpointError(
        f'{checkpoint.name} is of model type "{found}", which packvit does not run. '
        f"It runs: {known}."
    )
