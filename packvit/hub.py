"""Load an encoder by name or folder, or convert its checkpoint; config.json names the family."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from packvit.checkpoints import files as checkpoints
from packvit.checkpoints import saving
from packvit.checkpoints.description import describe
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.folders import WEIGHTS, listing
from packvit.checkpoints.layouts import LayoutName, image_tower, named_type
from packvit.config import GridPolicy, PatchOrder
from packvit.encoder import Encoder
from packvit.families import FAMILIES
from packvit.model.options import LoadOptions


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a converted checkpoint holds, and what it leaves behind."""

    folder: str
    layout: str
    tensors: int
    bytes: int  # of the weights' file
    skipped: tuple[str, ...]  # the source's names of another tower's tensors


def load(
    name_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str = "auto",
    revision: str | None = None,
    patch_order: PatchOrder = "hwc",
    positions: GridPolicy = "checkpoint",
    invariant: bool = False,
    compile: bool = False,
    fp8: bool = False,
) -> Encoder:
    """Load an encoder by its name on the hub, or from a folder, which needs no network.

    `device` None is CUDA if there is one; `dtype` None is bfloat16 there and float32 elsewhere.
    `attention` names a backend (`packvit info` lists them). `revision` pins a commit, branch or
    tag. `patch_order` "chw" is for callers whose patches are flattened channel first. `positions`
    "interpolate" allows grids that a learned table was not made for.

    `invariant` gives an image the same bits alone and in any pack, on one machine and set of
    versions. `compile` runs the blocks through torch.compile, once for packs of all sizes. `fp8`
    runs their matmuls in 8 bits (int8), for inference on Hopper; what that costs in accuracy is in
    docs/numerics.md.

    Raises: CheckpointError saying what is wrong with the checkpoint; ValueError for an option.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        attention=attention,
        patch_order=patch_order,
        positions=positions,
        invariant=invariant,
        compile=compile,
        fp8=fp8,
    )
    checkpoint = read_tower(name_or_folder, revision)
    return family_of(checkpoint).from_checkpoint(checkpoint, options)


def read_tower(name_or_folder: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Return a checkpoint; of a larger model on the hub, only the image tower is downloaded.

    Raises: CheckpointError.
    """
    families = [encoder.family for encoder in FAMILIES]
    return checkpoints.read(name_or_folder, revision=revision, part=image_tower(families))


def family_of(checkpoint: Checkpoint) -> type[Encoder]:
    """Return the class of the one family that claims a checkpoint by its config.json.

    Raises: CheckpointError listing the model types that packvit knows.
    """
    for encoder in FAMILIES:
        if encoder.family.claims(checkpoint.config):
            return encoder
    known = ", ".join(name for encoder in FAMILIES for name in encoder.family.model_types)
    found = named_type(checkpoint.config)
    raise CheckpointError(
        f'{checkpoint.name} is of model type "{found}", which packvit does not run. '
        f"It runs: {known}."
    )


def convert(
    name_or_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layout: LayoutName,
    *,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint to a new folder in one of its family's layouts, bit for bit.

    Nothing is cast, and no GPU is needed. config.json is written last, so that a folder in which
    the disk was full or the power went is no checkpoint to anyone.

    Raises: ValueError for a layout that the family does not have, or a folder that holds anything;
    CheckpointError saying what is wrong with the checkpoint, or why it cannot be written.
    """
    folder = Path(folder)
    check_free(folder)
    checkpoint = read_tower(name_or_folder, revision)
    encoder = family_of(checkpoint)
    described = describe(encoder.family, checkpoint)
    with torch.device("meta"):
        parameters = encoder(described.config, described.images).state_dict()
    made = saving.convert(parameters, checkpoint, encoder.family, described, layout)
    checkpoints.write(
        folder, config=made.config, tensors=made.tensors, preprocessor=made.preprocessor
    )
    size = (folder / WEIGHTS).stat().st_size
    return Conversion(str(folder), layout, len(made.tensors), size, made.skipped)


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises: ValueError saying what it holds.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Choose another one for the checkpoint.")
    if held := listing(folder):
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise ValueError(
            f"{folder} is not empty: it holds {held[0]}{more}. Choose a new or an empty folder."
        )
