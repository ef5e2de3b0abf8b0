"""Where the ids of a job's inputs start from, so that its photographs are found again. No torch.

The manifest records one path as `root`. For a job of one folder, archive or URL it is that, and ids
are paths in it; for any other job ids are paths as typed, and it is the folder they were typed in.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from packvit.corpus.inputs.addresses import is_url, spell
from packvit.corpus.inputs.listing import readable
from packvit.corpus.inputs.suffixes import is_archive

KEYS = ("path", "image_column")
ESCAPE = re.compile(rb"\\x(00|5c|[89a-f][0-9a-f])")  # what `listing.readable` writes


def record_root(
    paths: Sequence[str], lists: Sequence[str], image_column: str = "image"
) -> dict[str, str]:
    """Return what the manifest records of where ids start from; URLs without credentials."""
    root = os.getcwd()
    if len(paths) == 1 and not lists:
        [path] = paths
        if is_url(path):
            root = spell(path)
        elif os.path.isdir(path) or (is_archive(path) and os.path.isfile(path)):
            root = os.path.abspath(path)
    return dict(zip(KEYS, (readable(os.fsencode(root)), image_column), strict=True))


def recorded_root(manifest: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the root that a manifest records, None if none, and the column of images."""
    found = manifest.get("root")
    root, column = (found.get(key) for key in KEYS) if isinstance(found, dict) else (None, None)
    return root if isinstance(root, str) else None, column if isinstance(column, str) else "image"


def place(root: str, name: str) -> str:
    """Return the path or URL of the row `name`; that of an archive's member goes through it."""
    path = os.fsdecode(written(name))
    if is_url(path):
        return path
    start = os.fsdecode(written(root))
    if not is_url(start):
        return os.path.join(start, path)
    first, joint, rest = start.partition("::")  # zip://photos::s3://bucket/x.zip
    if "://" not in first:
        first, joint, rest = start, "", ""
    return f"{first.rstrip('/')}/{path}{joint}{rest}"


def written(name: str) -> bytes:
    """Return the bytes from which `readable` made a text."""
    return ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), os.fsencode(name))
