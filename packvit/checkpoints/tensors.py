"""The tensors of a folder's safetensors files, each read and checked when it is asked for.

Only safetensors are read: other formats can run code when they are opened. What a file claims is
checked: every tensor is in the file that the index says, and no number is NaN or infinite.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.folders import (
    INDEX,
    WEIGHTS,
    find_file,
    listing,
    no_weights,
    read_weight_map,
)
from packvit.out_of_memory import is_out_of_memory

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
        """Pickle as the files' paths; an encoder pickles its weights itself."""
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


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a floating-point tensor with NaN or infinity in it; `name` opens the sentence.

    The minimum and the maximum tell, since both keep NaN. This reads the tensor once and
    allocates nothing, which is 10 to 100 times as fast as `isfinite` over all elements.
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


def open_folder(folder: Path) -> Tensors:
    """Return the weights in `folder`: those of its one file, or else those of its shards.

    If there are both, the index is not read, as in the reference.

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
