"""What a file is by its suffix: a photograph, an archive of them, a table that describes them."""

import os
import re

# Of the formats that images/ decodes; HEIC with an extra, without which each is a row that says so.
SUFFIXES = b".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split()
PHOTOGRAPHS = frozenset(SUFFIXES)
ARCHIVES = (b".tar", b".parquet", b".zip")
COMPRESSED = re.compile(rb"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
# What comes with the photographs of a folder. Source: datasets 4, folder_based_builder.py.
METADATA = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")


def is_photograph(name: bytes) -> bool:
    """Return whether a name has the suffix of a photograph."""
    return os.path.splitext(name)[1].lower() in PHOTOGRAPHS


def is_other(name: bytes) -> bool:
    """Return whether a local file has no suffix of a photograph or an archive."""
    archive = os.path.splitext(name)[1].lower() in ARCHIVES
    return not (is_photograph(name) or archive) and os.path.isfile(name)
