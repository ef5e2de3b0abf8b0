"""A name or a folder to configuration and tensors: files, revisions and safety, and no models.

Weights are safetensors and nothing else: other formats can run code when they are opened. What a
file claims is checked before it is believed: an index may not name files outside its folder, a
link may not leave it, every tensor lies where the index says, and no number is NaN or infinite.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

EMBEDDED = {"tiny": Path(__file__).parent / "models" / "tiny"}

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

METADATA = {"format": "pt"}  # transformers asks for it; a second key would not be reproducible
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")
FINITE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one sentence or with a list of all problems."""


class NotCachedError(CheckpointError):
    """A file that the hub may have, but that was not downloaded while it could be reached."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for.

    A tensor is a view of the mapped file, so that none is held twice: clone it before changing it
    in place.

    Raises: CheckpointError, on reading, for a floating-point tensor that is not finite.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.handles = {file: open_weights(file) for file in files}
        self.holders: dict[str, list[Path]] = {}  # more than one is an error that `placed` reports
        for file, handle in self.handles.items():
            for name in sorted(handle.keys()):
                self.holders.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        file = self.holders[name][0]
        try:
            tensor = self.handles[file].get_tensor(name)
        except SafetensorError as error:
            found = self.handles[file].get_slice(name).get_dtype()
            raise CheckpointError(
                f"{name} in {file} is stored as {found}, which torch cannot hold. Convert it to "
                "F32, F16 or BF16."
            ) from error
        check_finite(f"{name} in {file}", tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape of the tensor `name`, from the file's header alone."""
        return torch.Size(self.handles[self.holders[name][0]].get_slice(name).get_shape())


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One published or saved model, as its files say it, before any family has looked at it."""

    name: str  # as the user gave it
    revision: str | None  # the commit hash on the hub; None for a folder
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...] = ()  # the weights' files in the order of their names; none in memory

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
        if self.files:
            digests = [(file_digest(file), file.name) for file in self.files]
        else:
            stored = save(storable(self.tensors), METADATA)
            digests = [(hashlib.sha256(stored).hexdigest(), WEIGHTS)]
        lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
        return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
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


def read(name_or_folder: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Return the checkpoint that a folder holds, or the hub's model `owner/name`.

    A folder is read without any network. Of the hub's model all files come from one commit, that
    of `revision` (a branch, a tag or a hash; by default the main branch), which is recorded. The
    token, the cache, the endpoint and offline mode are huggingface_hub's own settings.

    Raises: CheckpointError saying what is wrong with the name, the download or the files.
    """
    name = os.fspath(name_or_folder)
    folder = find_folder(name, is_path=not isinstance(name_or_folder, str))
    if folder is None:
        snapshot = download(name, revision)
        return read_folder(snapshot, name, snapshot.name)
    if revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, but {name!r} is a folder, and a folder has no revisions. "
            "Leave revision out, or give a hub name."
        )
    return read_folder(folder, name, None)


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


def read_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    """Return the checkpoint in `folder`, with all its headers checked and no tensor read yet."""
    config = read_json(folder, CONFIG)
    if config is None:
        raise CheckpointError(
            f"{folder} has no {CONFIG}, so it is not a checkpoint. It holds "
            f"{', '.join(listing(folder)[:10]) or 'nothing'}."
        )
    preprocessor = read_json(folder, PREPROCESSOR)
    weight_map = read_weight_map(folder)
    if weight_map is None:
        file = find_file(folder, WEIGHTS)
        if file is None:
            raise CheckpointError(no_weights(str(folder), listing(folder)))
        tensors = Tensors([file])
    else:
        tensors = placed(folder, weight_map)
    return Checkpoint(name, revision, config, preprocessor, tensors, tuple(tensors.handles))


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


def placed(folder: Path, weight_map: Mapping[str, str]) -> Tensors:
    """Return the tensors of all shards, each of which lies in the one shard that the index names.

    Raises: CheckpointError listing every tensor that is missing, unexpected, or in two shards.
    """
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
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
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


def download(name: str, revision: str | None) -> Path:
    """Return the cache's folder with the hub's model `name`; the folder is named for the commit.

    The first file resolves `revision`, and all others are asked for at that commit, so that a push
    in between cannot mix two versions.
    """
    config = fetch(name, CONFIG, revision)
    if config is None:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"The model {name!r} has no {CONFIG} on the hub{at}.")
    snapshot, commit = config.parent, config.parent.name
    fetch(name, PREPROCESSOR, commit)
    try:
        fetch(name, INDEX, commit)
    except NotCachedError:
        # Other programs that fill the cache never ask for an index where there is one file.
        if not (snapshot / WEIGHTS).is_file():
            raise
    weight_map = read_weight_map(snapshot)
    wanted = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    if absent := [file for file in wanted if fetch(name, file, commit) is None]:
        if weight_map is None:
            raise CheckpointError(no_weights(f"The model {name!r}", hub_files(name, commit)))
        raise CheckpointError(
            f"The model {name!r} lacks shards that its index names: {', '.join(absent)}."
        )
    return snapshot


def fetch(name: str, file: str, revision: str | None) -> Path | None:
    """Return where the cache holds `file` of the hub's model `name`, downloading it if need be.

    None where the repository has no such file. A commit that is in the cache, the absence of files
    included, needs no request at all.
    """
    import httpx
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
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(explain(error, name, file, revision)) from error


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
    import httpx
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(name, revision=commit))
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return []


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

    All files are complete on disk under temporary names before the first takes its own, so a full
    disk or an interruption leaves what was there before.

    Raises: CheckpointError if files are in the way that would be read with the new ones, or if the
    folder cannot be written.
    """
    folder = Path(folder)
    texts = (
        {CONFIG: config} if preprocessor is None else {PREPROCESSOR: preprocessor, CONFIG: config}
    )
    for name in (INDEX,) if preprocessor is not None else (INDEX, PREPROCESSOR):
        if os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder} already has {name}, which would be read with the new weights. Remove "
                "it, or write to another folder."
            )
    suffix = f"{token_hex(4)}.tmp"
    staged = {name: folder / f".{name}.{suffix}" for name in (WEIGHTS, *texts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in texts.items():
            staged[name].write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
        save_file(storable(tensors), staged[WEIGHTS], METADATA)
        # safetensors makes files that only their owner may read; the others follow the umask.
        staged[WEIGHTS].chmod(staged[CONFIG].stat().st_mode)
        for temporary in staged.values():
            flush(temporary)
        for name, temporary in staged.items():
            os.replace(temporary, folder / name)
        flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"The checkpoint cannot be written to {folder}: {reason}.") from error
    finally:
        for temporary in staged.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
