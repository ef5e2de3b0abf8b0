"""A name or a folder to a checkpoint, and back to a folder; no models."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from packvit.atomic import replacing
from packvit.checkpoints.downloads import download
from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.folders import (
    CONFIG,
    INDEX,
    PREPROCESSOR,
    PROCESSOR,
    WEIGHTS,
    find_folder,
    listing,
    read_image_settings,
    read_json,
)
from packvit.checkpoints.ranges import Part
from packvit.checkpoints.tensors import Tensors, open_folder

METADATA = {"format": "pt"}  # transformers asks for it; a second key would not be reproducible


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One published or saved model as its files have it; it knows no family."""

    name: str  # as the user gave it
    revision: str | None  # the commit hash on the hub; None for a folder
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None  # the image settings, wherever they were found
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...] = ()  # the weights' files in the order of their names; none in memory
    settings_file: str = PREPROCESSOR  # which has the image settings

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of the tensor `name`, without reading it where it lies in a file."""
        if isinstance(self.tensors, Tensors):
            return self.tensors.shape_of(name)
        return self.tensors[name].shape

    def sha256(self) -> str:
        """Return one digest of the weights, computed at each call.

        It is the digest of what `sha256sum` prints for the files, in order and without folders, so
        anyone can compute it. In memory it is that of the file which `write` would write.
        """
        digests = {file.name: file_digest(file) for file in self.files}
        if not digests:
            stored = save(storable(self.tensors), METADATA)
            digests[WEIGHTS] = hashlib.sha256(stored).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    try:
        digest, piece = hashlib.sha256(), memoryview(bytearray(2**24))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(piece[:count])  # large pieces: other threads run meanwhile
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def read(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    part: Part | None = None,
) -> Checkpoint:
    """Return the checkpoint that a folder holds, or the hub's model `owner/name`.

    A folder is read without any network. Of the hub's model all files come from one commit, that
    of `revision` (a branch, a tag or a hash; by default the main branch), which is recorded. Of a
    much larger model only `part` is downloaded. The token, the cache, the endpoint and offline
    mode are huggingface_hub's own settings.

    Raises: CheckpointError saying what is wrong with the name, the download or the files; TypeError
    for what is no name.
    """
    if not isinstance(name_or_folder, str | os.PathLike):
        raise TypeError(
            f"name_or_folder is {name_or_folder!r:.80}, but must be a hub name or a folder's path."
        )
    name = os.fspath(name_or_folder)
    folder = find_folder(name, is_path=not isinstance(name_or_folder, str))
    if folder is None:
        snapshot = download(name, revision, part)
        return read_folder(snapshot, name, snapshot.name)
    if revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, but {name!r} is a folder, and a folder has no revisions. "
            "Leave revision out, or give a hub name."
        )
    return read_folder(folder, name, None)


def read_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    """Return the checkpoint in `folder`, with all its headers checked and no tensor read yet."""
    config = read_json(folder, CONFIG)
    if config is None:
        raise CheckpointError(
            f"{folder} has no {CONFIG}, so it is not a checkpoint. It holds "
            f"{', '.join(listing(folder)[:10]) or 'nothing'}."
        )
    preprocessor, file = read_image_settings(folder)
    tensors = open_folder(folder)
    return Checkpoint(name, revision, config, preprocessor, tensors, tuple(tensors.handles), file)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a file takes them: by name, on the host, contiguous, none shared."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    return ready


def write(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    preprocessor: Mapping[str, Any] | None,
) -> None:
    """Write a checkpoint that `read` reads back; the same values give the same bytes.

    Image settings go to preprocessor_config.json, which every version of transformers reads.

    All files are complete on disk under temporary names before the first takes its own, so a full
    disk or an interruption leaves what was there before. Each file then takes its place at once,
    but one after the other: what is killed between two can leave new weights with an old config.

    Raises: CheckpointError if files are in the way that would be read with the new ones, or if the
    folder cannot be written.
    """
    folder = Path(folder)
    texts = (
        {CONFIG: config} if preprocessor is None else {PREPROCESSOR: preprocessor, CONFIG: config}
    )
    # Beside the one file neither we nor transformers look at an index, but others go by it:
    # huggingface_hub 1.33 (`load_torch_model`) and vLLM (`filter_duplicate_safetensors_files`).
    for name in sorted({INDEX, PREPROCESSOR} - texts.keys()):
        if os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder} already has {name}, which would be read as part of the new checkpoint. "
                "Remove it, or write to another folder."
            )
    found, file = read_image_settings(folder)
    if file == PROCESSOR and found != preprocessor:
        raise CheckpointError(
            f"{folder} already has {PROCESSOR} with other image settings, which would be read as "
            "part of the new checkpoint. Remove it, or write to another folder."
        )
    targets = [folder / name for name in (WEIGHTS, *texts)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(*targets) as (weights, *others):
            for path, value in zip(others, texts.values(), strict=True):
                path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
            save_file(storable(tensors), weights, METADATA)
            # safetensors makes files that only their owner may read; the others follow the umask.
            weights.chmod(others[0].stat().st_mode)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"The checkpoint cannot be written to {folder}: {reason}.") from error
