"""The hub's models to folders of its cache. No torch."""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packvit.checkpoints.errors import CheckpointError, NotCachedError
from packvit.checkpoints.folders import (
    CONFIG,
    INDEX,
    NESTED,
    PREPROCESSOR,
    PROCESSOR,
    WEIGHTS,
    no_weights,
    read_json,
    read_weight_map,
)
from packvit.checkpoints.ranges import (
    Part,
    choose_from_file,
    choose_from_shards,
    fetch_tensors,
    write_texts,
)


class NoRangesError(Exception):
    """The hub, or a mirror of it, does not send parts of files."""


def download(name: str, revision: str | None, part: Part | None = None) -> Path:
    """Return the cache's folder with the hub's model `name`; the folder is named for the commit.

    Of a model that is much larger than `part`, only that part's tensors are downloaded.

    The first file resolves `revision`, and all others are asked for at that commit, so that a push
    in between cannot mix two versions. Shards are asked for only if there is no one file.
    """
    config = fetch(name, CONFIG, revision)
    if config is None:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"The model {name!r} has no {CONFIG} on the hub{at}.")
    snapshot, commit = config.parent, config.parent.name
    fetch_image_settings(name, commit)
    entries = (read_json(snapshot, CONFIG) or {}) if part else {}
    if part and part.applies(entries):
        try:
            if folder := download_part(name, snapshot, part, entries):
                return folder
        except NoRangesError:
            pass  # a mirror that sends whole files alone
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


def download_part(name: str, snapshot: Path, part: Part, config: Mapping[str, Any]) -> Path | None:
    """Return a folder with the wanted tensors of a model, or None where the whole is wanted.

    Raises: CheckpointError saying what is wrong with the model or the connection.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    commit = snapshot.name
    kept = Path(constants.HF_HUB_CACHE).parent / "packvit" / name.replace("/", "--") / part.name
    folder = kept / commit
    if (folder / WEIGHTS).is_file():
        return folder
    if (snapshot / WEIGHTS).exists():  # the whole is there already
        return None

    def request(file: str, start: int, end: int) -> tuple[bytes, int] | None:
        return fetch_range(name, file, commit, start, end)

    def choose_names(names: Collection[str]) -> Collection[str]:
        return part.wanted(config, names)

    try:
        chosen = choose_from_file(request, WEIGHTS, choose_names)
    except NotCachedError:
        chosen = None
    if chosen is None:
        if fetch(name, INDEX, commit) is None:
            return None
        weight_map = read_weight_map(snapshot) or {}
        names = choose_names(weight_map)
        if len(names) == len(weight_map) or all(
            (snapshot / weight_map[name]).exists() for name in names
        ):
            return None
        chosen = choose_from_shards(request, weight_map, names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".lock"):
            if not (folder / WEIGHTS).is_file():
                found = {file: snapshot / file for file in (CONFIG, PREPROCESSOR, PROCESSOR)}
                write_texts(folder, {file: path for file, path in found.items() if path.is_file()})
                fetch_tensors(request, chosen, folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(
            f"{name!r} cannot be written to {folder}: {error.strerror or error}. Free the disk, or "
            "set HF_HOME or HF_HUB_CACHE so that the folder around the cache can be written to."
        ) from error
    return folder


def fetch_range(
    name: str, file: str, commit: str, start: int, end: int
) -> tuple[bytes, int] | None:
    """Return bytes of a file of the hub's model, and the file's size; None if it has no such file.

    Raises: CheckpointError saying why they cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    try:
        if constants.HF_HUB_OFFLINE:
            raise NotCachedError(explain_offline(name, file))
        with http_stream_backoff(
            "GET",
            hf_hub_url(name, file, revision=commit),
            headers={**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as answer:
            hf_raise_for_status(answer)
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status_code != 206 or not size.isdecimal():
                raise NoRangesError(name)  # before its body, which may be the whole file
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > end - start:  # it sends more than it was asked for
                    raise NoRangesError(name)
            return bytes(data), int(size)
    except EntryNotFoundError:
        return None
    except (NotCachedError, NoRangesError):
        raise
    except (*client_errors(), RuntimeError, ValueError) as error:
        raise CheckpointError(explain(error, name, file, commit)) from error


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


def fetch(name: str, file: str, revision: str | None) -> Path | None:
    """Return where the cache holds `file` of the hub's model `name`, downloading it if need be.

    None if the repository has no such file. For a commit in the cache no request is made; the
    cache also notes which files the repository lacks.
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
        with without_tries():
            return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as error:
        raise NotCachedError(explain(error, name, file, revision)) from error
    except EntryNotFoundError:
        return None
    except (*client_errors(), RuntimeError, ValueError) as error:
        raise CheckpointError(explain(error, name, file, revision)) from error


@contextmanager
def without_tries() -> Iterator[None]:
    """Keep the hub's client from logging each failed try before our message says what is wrong.

    Messages about a rate limit are kept, since waiting for it may take minutes.

    Source: huggingface_hub 1.33 and 2.4, utils/_http.py.
    """

    def says_more(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not (said.startswith(("Retrying in", "HTTP Error")) or " thrown while req" in said)

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(says_more)
    try:
        yield
    finally:
        logger.removeFilter(says_more)


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
    """Return a message that says why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    log_in = 'log in with "hf auth login" or set HF_TOKEN'
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return explain_offline(name, file)
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


def explain_offline(name: str, file: str) -> str:
    """Return the message for a file that is not in the cache while offline mode is on."""
    return (
        f"{file} of {name!r} is not in the cache, and HF_HUB_OFFLINE forbids "
        "downloading it. Unset it for one run, or give a folder."
    )


def hub_files(name: str, commit: str) -> list[str]:
    """Return the files of the hub's model, for a message; none if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(name, revision=commit))
    except client_errors():
        return []
