"""What a checkpoint's folder holds, and the folder that a name stands for. No torch.

Nothing is opened that lies outside its folder: an index may not name such a file, and a link may
not lead to one.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from packvit.checkpoints.errors import CheckpointError

EMBEDDED = {"tiny": Path(__file__).parents[1] / "models" / "tiny"}

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of transformers 5: image settings and others, nested
NESTED = "image_processor"  # the entry of processor_config.json with the image settings
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MOST_JSON = 64 << 20  # bytes: the index of a model of a million tensors has less

OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")


def find_folder(name: str, *, is_path: bool) -> Path | None:
    """Return the folder that `name` stands for, or None if it is a name on the hub."""
    if name in EMBEDDED and not is_path:
        if EMBEDDED[name].is_dir():
            return EMBEDDED[name]
        raise CheckpointError(
            f"The embedded model {name!r} is not at {EMBEDDED[name]}. Install packvit again."
        )
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise CheckpointError(
            f"{name!r} is a file, but a checkpoint is a folder with {CONFIG} and {WEIGHTS}. "
            "Give the folder."
        )
    suffixes = (".safetensors", ".json", *OTHER_FORMATS)
    if is_path or name.startswith((".", "/", "~")) or name.endswith(("/", *suffixes)):
        raise CheckpointError(f"There is no folder {name!r}. Check the path.")
    if name.count("/") != 1:
        raise CheckpointError(
            f"There is no folder {name!r}, and a hub name has the form owner/name, with one slash. "
            f"Embedded models: {', '.join(sorted(EMBEDDED))}."
        )
    return None


def read_image_settings(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return how the checkpoint in `folder` wants its images, and the file that says so.

    Settings nested in processor_config.json come before preprocessor_config.json.

    Source: transformers 5.17, `get_image_processor_dict` in image_processing_base.py.
    """
    nested = (read_json(folder, PROCESSOR) or {}).get(NESTED)
    if nested is None:
        return read_json(folder, PREPROCESSOR), PREPROCESSOR
    if not isinstance(nested, dict):
        raise CheckpointError(
            f"{folder / PROCESSOR} has {NESTED} {nested!r}, but it must be an object. Download or "
            "copy it again."
        )
    return nested, PROCESSOR


def find_file(folder: Path, name: str) -> Path | None:
    """Return the regular file `name` of `folder`, or None if there is nothing of that name.

    Raises: CheckpointError for a link that leaves the folder, and for what is not a file: opening
    a pipe would wait for ever.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in allowed_roots(folder)):
        raise CheckpointError(
            f"{path} is a link to {target}, outside its folder. Copy the file into the folder."
        )
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a regular file, or is a link to nothing.")
    return path


def allowed_roots(folder: Path) -> list[Path]:
    """Return where the files of `folder` may lie: in it or, in the hub's cache, among its blobs.

    Source: huggingface_hub 1.33, `file_download.py` (snapshots/COMMIT/FILE links to blobs/ETAG)
    and `utils/_shared_blobs.py` (which may link to a store that all repositories share).
    """
    folder = Path(os.path.realpath(folder))
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not (repository / "blobs").is_dir():
        return [folder]
    shared = repository.parent / "blobs"
    is_store = (shared / ".huggingface-shared-blobs").is_file()
    return [folder, repository, shared] if is_store else [folder, repository]


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the object in the JSON file `name` of `folder`, or None if there is no such file."""
    path = find_file(folder, name)
    if path is None:
        return None
    if path.stat().st_size > MOST_JSON:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but a checkpoint's JSON has at most "
            f"{MOST_JSON}. Download or copy it again."
        )
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON. Download or copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Return which shard holds each tensor, by the folder's index, or None if it has no index.

    Raises: CheckpointError unless every shard is a bare file name that ends in .safetensors.
    """
    index = read_json(folder, INDEX)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map, the object that names the file of each tensor. "
            "Download or copy it again."
        )
    shards = {repr(shard): shard for shard in weight_map.values()}
    refused = [shown for shown in sorted(shards) if not is_bare(shards[shown])]
    if refused:
        raise CheckpointError(
            f"{folder / INDEX} may only name .safetensors files of its own folder, but names:\n  "
            + "\n  ".join(refused)
        )
    return weight_map


def is_bare(shard: object) -> bool:
    """Say whether `shard` names a safetensors file of its own folder, on any system."""
    return isinstance(shard, str) and bool(re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard))


def no_weights(where: str, found: list[str]) -> str:
    """Return the sentence that tells what weights were found instead of the published ones."""
    wanted = f"packvit reads {WEIGHTS}, or {INDEX} and its shards"
    if others := [file for file in found if file.endswith(".safetensors")]:
        return (
            f"{where} holds {', '.join(others)}, but {wanted}. Give a whole model's one file "
            "that name."
        )
    if others := [file for file in found if file.endswith(OTHER_FORMATS)]:
        return (
            f"{where} holds weights as {', '.join(others)}, but {wanted}, since other formats can "
            "run code when opened. Convert it, where you trust it: load it with transformers, "
            "then call save_pretrained(folder)."
        )
    return f"{where} holds no weights: {wanted}. It holds {', '.join(found[:10]) or 'nothing'}."


def listing(folder: Path) -> list[str]:
    """Return the names in `folder`, for a sentence about what is not there."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
