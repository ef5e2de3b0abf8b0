"""A name or a folder to configuration and tensors, and back to a folder; no models.

Weights are safetensors and nothing else: other formats can run code when they are opened. What a
file claims is checked before it is believed: every tensor lies where the index says, and no number
is NaN or infinite.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from packvit.atomic import replacing
from packvit.checkpoints.downloads import download
from packvit.checkpoints.errors import CheckpointError as CheckpointError
from packvit.checkpoints.folders import (
    CONFIG,
    INDEX,
    PREPROCESSOR,
    PROCESSOR,
    WEIGHTS,
    find_file,
    find_folder,
    listing,
    no_weights,
    read_image_settings,
    read_json,
    read_weight_map,
)
from packvit.checkpoints.ranges import Part
from packvit.out_of_memory import is_out_of_memory

METADATA = {"format": "pt"}  # transformers asks for it; a second key would not be reproducible
# Source: torch 2.13: compiled, sharded and checkpointed modules, which may stand around any module.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
FINITE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for.

    A tensor is a view of the mapped file, so that none is held twice: clone it before changing it
    in place.

    Raises: CheckpointError, on reading, for a floating-point tensor that is not finite.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.handles = {file: open_weights(file) for file in files}
        self.holders: dict[str, list[Path]] = {}  # more than one is an error that `placed` reports
        self.written: dict[tuple[Path, str], str] = {}  # names as the files have them
        for file, handle in self.handles.items():
            held = set(handle.keys())
            for written in sorted(held):
                name = unwrapped(written)
                if name != written and name in held:  # with and without a wrapper: unexpected
                    name = written
                self.written[file, name] = written
                self.holders.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        file = self.holders[name][0]
        try:
            tensor = self.handles[file].get_tensor(self.written[file, name])
        except SafetensorError as error:
            raise CheckpointError(
                f"{name} in {file} is stored as {self.stored_as(name)}, which torch cannot hold. "
                "Convert it to F32, F16 or BF16."
            ) from error
        check_finite(f"{name} in {file}", tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tensors":
        """Share the files: nobody writes to them."""
        return self

    def __reduce__(self) -> tuple[Callable[..., "Tensors"], tuple[tuple[Path, ...]]]:
        """Travel as the files' paths; an encoder brings its weights itself."""
        return reopen, (tuple(self.handles),)

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of the tensor `name`, from the file's header alone."""
        file = self.holders[name][0]
        return torch.Size(self.handles[file].get_slice(self.written[file, name]).get_shape())

    def stored_as(self, name: str) -> str:
        """Return what the file's header calls the dtype of the tensor `name`."""
        file = self.holders[name][0]
        return self.handles[file].get_slice(self.written[file, name]).get_dtype()


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that wrappers of its modules add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def reopen(files: tuple[Path, ...]) -> Tensors:
    """Return the tensors of files where they are, and none on a machine that has no such files."""
    return Tensors(files if all(file.exists() for file in files) else ())


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One published or saved model, as its files say it, before any family has looked at it."""

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
        """Return one digest of the weights, computed anew at each call.

        It is the digest of what `sha256sum` prints for the files, in order and without folders,
        so anyone can compute it. In memory it is that of the file which `write` would write.
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


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a floating-point tensor with NaN or infinity in it; `name` opens the sentence.

    The extremes tell: NaN survives both. This reads the tensor once and allocates nothing, which
    is 10 to 100 times as fast as `isfinite` over all elements.
    """
    if tensor.dtype not in FINITE_DTYPES or not tensor.numel():
        return
    if all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        return
    bad = int((~tensor.isfinite()).sum())
    raise CheckpointError(
        f"{name} holds {bad} values that are NaN or infinite, of {tensor.numel()}; weights must be "
        "finite. The checkpoint is damaged: download it again, or ask its author."
    )


def read(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    part: Part | None = None,
) -> Checkpoint:
    """Return the checkpoint that a folder holds, or the hub's model `owner/name`.

    A folder is read without any network. Of the hub's model all files come from one commit, that
    of `revision` (a branch, a tag or a hash; by default the main branch), which is recorded; of a
    much larger model `part` alone. The
    token, the cache, the endpoint and offline mode are huggingface_hub's own settings.

    Raises: CheckpointError saying what is wrong with the name, the download or the files.
    """
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


def open_folder(folder: Path) -> Tensors:
    """Return the weights in `folder`: those of its one file, or else those of its shards.

    Where there are both, the index is not even looked at: these are the reference's numbers.

    Source: transformers 5.17, `_get_resolved_checkpoint_files` in `modeling_utils.py`.
    """
    if file := find_file(folder, WEIGHTS):
        return Tensors([file])
    weight_map = read_weight_map(folder)
    if weight_map is None:
        raise CheckpointError(no_weights(str(folder), listing(folder)))
    return placed(folder, weight_map)


def placed(folder: Path, weight_map: Mapping[str, str]) -> Tensors:
    """Return the tensors of all shards, each of which lies in the one shard that the index names.

    Raises: CheckpointError listing every tensor that is missing, unexpected, or in two shards.
    """
    weight_map = {unwrapped(name): shard for name, shard in weight_map.items()}
    shards = {shard: find_file(folder, shard) for shard in sorted(set(weight_map.values()))}
    if absent := [shard for shard, file in shards.items() if file is None]:
        raise CheckpointError(f"{folder} lacks shards that its index names: {', '.join(absent)}.")
    tensors = Tensors(file for file in shards.values() if file)
    problems = []
    for name in sorted(weight_map.keys() | tensors.keys()):
        found = [file.name for file in tensors.holders.get(name, [])]
        if not found:
            problems.append(f"{name} is missing from {weight_map[name]}")
        elif len(found) > 1:
            problems.append(f"{name} is in {' and '.join(found)}")
        elif name not in weight_map:
            problems.append(f"{name} is in {found[0]}, but not in the index")
        elif found[0] != weight_map[name]:
            problems.append(f"{name} is in {found[0]}, but the index says {weight_map[name]}")
    if problems:
        raise CheckpointError(
            f"The shards do not hold what {folder / INDEX} says:\n  " + "\n  ".join(problems)
        )
    return tensors


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file: its header is checked against its size, no tensor is read."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    if name != str(path):
        raise CheckpointError(
            f"{name} cannot be opened: safetensors takes only paths that are UTF-8, and this one "
            "is not. Rename the folder."
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RuntimeError as error:  # torch's, which maps the file
        if not is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} takes {path.stat().st_size / 2**30:.1f} GiB, more than this process can have. "
            "Choose a smaller model, or give it more memory."
        ) from error
    except SafetensorError as error:
        with path.open("rb") as file:
            is_pointer = file.read(23) == b"version https://git-lfs"
        if is_pointer:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights. Fetch them with: git lfs pull"
            ) from error
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its header does not fit its "
            f"{path.stat().st_size} bytes. Download or copy it again."
        ) from error


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
