"""A name to files on disk: the hub's models are downloaded, and what a folder holds is found.

Nothing is opened that lies outside its folder: an index may not name such a file, and a link may
not lead to one. No torch.
"""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

EMBEDDED = {"tiny": Path(__file__).parents[1] / "models" / "tiny"}

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of transformers 5: image settings and others, nested
NESTED = "image_processor"  # the entry of processor_config.json with the image settings
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one sentence or with a list of all problems."""


class NotCachedError(CheckpointError):
    """A file that the hub may have, but that was not downloaded while it could be reached."""


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


def download(name: str, revision: str | None) -> Path:
    """Return the cache's folder with the hub's model `name`; the folder is named for the commit.

    The first file resolves `revision`, and all others are asked for at that commit, so that a push
    in between cannot mix two versions. Shards are asked for only where there is no one file.
    """
    config = fetch(name, CONFIG, revision)
    if config is None:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"The model {name!r} has no {CONFIG} on the hub{at}.")
    snapshot, commit = config.parent, config.parent.name
    fetch_image_settings(name, commit)
    try:
        if fetch(name, WEIGHTS, commit):
            return snapshot
    except NotCachedError:
        # `hf download` fills the cache without noting which files the model does not have.
        if not (snapshot / INDEX).is_file():
            raise
    fetch(name, INDEX, commit)
    weight_map = read_weight_map(snapshot)
    if weight_map is None:
        raise CheckpointError(no_weights(f"The model {name!r}", hub_files(name, commit)))
    shards = sorted(set(weight_map.values()))
    if absent := [shard for shard in shards if fetch(name, shard, commit) is None]:
        raise CheckpointError(
            f"The model {name!r} lacks shards that its index names: {', '.join(absent)}."
        )
    return snapshot


def fetch_image_settings(name: str, commit: str) -> None:
    """Download the file that says how the hub's model wants its images, if it has one."""
    try:
        nested = fetch(name, PROCESSOR, commit)
    except NotCachedError:
        # Caches that `hf download` or an earlier packvit filled do not note whether a model has
        # this file; transformers too goes by the other one then.
        if fetch(name, PREPROCESSOR, commit) is None:
            raise
        return
    if nested is None or (read_json(nested.parent, PROCESSOR) or {}).get(NESTED) is None:
        fetch(name, PREPROCESSOR, commit)


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


def fetch(name: str, file: str, revision: str | None) -> Path | None:
    """Return where the cache holds `file` of the hub's model `name`, downloading it if need be.

    None where the repository has no such file. A commit that is in the cache, the absence of files
    included, needs no request at all.
    """
    check_endpoint()
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # A branch may have moved since its files were found absent; a commit cannot.
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
            cached = try_to_load_from_cache(name, file, revision=revision)
            if cached is _CACHED_NO_EXIST:
                return None
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as error:
        raise NotCachedError(explain(error, name, file, revision)) from error
    except EntryNotFoundError:
        return None
    except (*client_errors(), RuntimeError, ValueError) as error:
        raise CheckpointError(explain(error, name, file, revision)) from error


def check_endpoint() -> None:
    """Check what HF_ENDPOINT says: huggingface_hub 2 fails while it is imported, 1 on a request.

    Raises: CheckpointError if it is not the URL of a hub.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is None:
        return
    try:
        url = urlsplit(endpoint)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise CheckpointError(
            f"HF_ENDPOINT is {endpoint!r}, but must be a URL such as https://huggingface.co. "
            "Correct it, or unset it."
        )


def client_errors() -> tuple[type[Exception], ...]:
    """Return what a request to the hub can raise: its HTTP client's errors, and OSError.

    The client is httpx in huggingface_hub 1 and httpx2 in 2; both are bases of the hub's own error.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def explain(error: Exception, name: str, file: str, revision: str | None) -> str:
    """Return what a failed download means to the user, in our words, and what to do about it."""
    from huggingface_hub import constants, errors

    log_in = 'log in with "hf auth login" or set HF_TOKEN'
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return (
                f"{file} of {name!r} is not in the cache, and HF_HUB_OFFLINE forbids to download "
                "it. Unset it for one run, or give a folder."
            )
        if not isinstance(error.__cause__, errors.HfHubHTTPError):
            return (
                f"The hub cannot be reached, and {file} of {name!r} is not in the cache. Check the "
                "network and HF_ENDPOINT, or give a folder."
            )
        error = error.__cause__
    match error:
        case errors.GatedRepoError():
            return f"The model {name!r} is gated. Accept its terms on its hub page, then {log_in}."
        case errors.RepositoryNotFoundError():
            return (
                f"There is no folder {name!r}, and no model of that name on the hub that you may "
                f"see. Check the spelling; if it is private, {log_in}."
            )
        case errors.RevisionNotFoundError():
            return (
                f"The model {name!r} has no revision {revision!r}. Give a branch, a tag, or a "
                "whole commit hash."
            )
        case errors.HFValidationError():
            return f"There is no folder {name!r}, and it cannot be a hub name, owner/name."
        case errors.HfHubHTTPError():
            status = error.response.status_code
            advice = f"Please {log_in}" if status in (401, 403) else "Try again later"
            return f"The hub answered {status} for {file} of {name!r}. {advice}."
    reason = getattr(error, "strerror", None) or type(error).__name__
    return (
        f"{file} of {name!r} could not be downloaded ({reason}). Check the network and the disk of "
        "the cache, then try again."
    )


def hub_files(name: str, commit: str) -> list[str]:
    """Return what the hub's model holds; nothing if the hub won't say, as only a message asks."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(name, revision=commit))
    except client_errors():
        return []


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
