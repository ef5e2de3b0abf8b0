"""Open the files of a feature folder, which others may have made: no pipes, links or endless JSON.

No torch.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

from packvit.corpus.folder.names import Names
from packvit.corpus.folder.parts import find_keep_flaw
from packvit.corpus.folder.stores import Folder, StorePath

MOST_MANIFEST = 16 << 20  # bytes
MOST_LOG = 1 << 30
MOST_DEPTH = 20  # of nested values in a manifest
MOST_WIDTH = 1 << 20


def open_own(path: Folder) -> BufferedReader:
    """Open a regular file for reading, without following a link or waiting for a pipe.

    Raises: FileNotFoundError; another OSError saying what it is instead.
    """
    if isinstance(path, StorePath):
        return path.open()
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, f"its folder {path.parent.name} is a link", str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_own(path: Folder, most: int) -> bytes:
    """Return the bytes of a regular file of at most `most` bytes.

    Raises: OSError, as `open_own`, or if there are more.
    """
    with open_own(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB", str(path))
    return data


def decode_object(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object in `data`, or None for anything else, or one nested too deeply."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and is_shallow(found) else None


def is_shallow(value: object) -> bool:
    """Return whether values are nested at most `MOST_DEPTH` deep."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        if not inner:
            return True
        level = inner
    return False


def find_flaw(manifest: Mapping[str, Any], names: Names) -> str | None:
    """Return what is wrong with the entries of a manifest, as the end of a sentence, or None."""
    config, lists = manifest.get("config"), manifest.get("lists")
    if not is_count(manifest.get("inputs")):
        return f"has inputs {shorten(manifest.get('inputs'))}, which is not a number of inputs."
    if not is_count(manifest.get("rows_per_part"), least=1):
        return "has a rows_per_part that is not a number of rows."
    width = config.get("width") if isinstance(config, dict) else None
    if not is_count(width, least=1, most=MOST_WIDTH):
        return "has no config with the width of features."
    shared = config.get("projection") if isinstance(config, dict) else None
    if manifest.get("text_space") == "projected" and not is_count(shared, least=1, most=MOST_WIDTH):
        return "has no config with the width of projected features."
    if not isinstance(lists, list) or not all(isinstance(name, str) for name in lists):
        return "has lists that are not a list of names."
    if manifest.get("dtype_out") not in ("float16", "float32"):
        return "has a dtype_out that is neither float16 nor float32."
    if manifest.get("vector_dtype", "float32") not in ("float16", "float32"):
        return "has a vector_dtype that is neither float16 nor float32."
    if type(manifest.get("complete")) is not bool:
        return "does not say whether the job is complete."
    if flaw := find_keep_flaw(manifest) or find_reuse_flaw(manifest):
        return flaw
    return find_export_flaw(manifest.get("exports", {}), names)


def find_reuse_flaw(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest's record of rows taken over, or None."""
    devices = manifest.get("device_names", [])
    if not isinstance(devices, list) or not all(isinstance(name, str) for name in devices):
        return "has device_names that are not a list of names."
    if "mtimes" in manifest and not is_record(manifest["mtimes"]):
        return "has mtimes without a size and a sha256."
    entry = manifest.get("reused", {"fingerprints": [], "across_versions": 0, "trust_mtime": 0})
    wanted = {"fingerprints", "across_versions", "trust_mtime"}
    if not isinstance(entry, dict) or entry.keys() != wanted:
        return "has reused that is not a record of ours."
    prints = entry["fingerprints"]
    if not isinstance(prints, list) or not all(isinstance(each, str) for each in prints):
        return "has fingerprints that are not a list of texts."
    return None


def is_record(value: object) -> bool:
    """Return whether a value is the size and the sha256 of a file."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "sha256"}:
        return False
    return is_count(value["bytes"]) and isinstance(value["sha256"], str)


def find_export_flaw(exports: object, names: Names) -> str | None:
    """Return what is wrong with a manifest's record of exports, or None."""
    if not isinstance(exports, dict):
        return "has exports that are not an object."
    for name, record in exports.items():
        if name not in (names.pooled, names.ids):
            return f"has exports {shorten(name)}, which is not a name of ours."
        if not is_record(record):
            return f"has exports {name} without its size and sha256."
    return None


def is_count(value: object, *, least: int = 0, most: int = 10**18) -> bool:
    """Return whether a value is a whole number in a range."""
    return type(value) is int and least <= value <= most


def shorten(value: object) -> str:
    """Return a value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
