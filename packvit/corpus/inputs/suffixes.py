"""What a file is by its suffix: a photograph, an archive of them, a table that describes them."""

import os
import re

from packvit.corpus.inputs.addresses import bare

# Of the formats that images/ decodes; HEIC with an extra, without which each is a row that says so.
SUFFIXES = b".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split()
PHOTOGRAPHS = frozenset(SUFFIXES)
ARCHIVES = (b".tar", b".parquet", b".zip")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")
UNREAD = re.compile(rb"\.tar\.(z|lz|lz4|lzma|lzo|br|7z|rar)$", re.IGNORECASE)
# What comes with the photographs of a folder. Source: datasets 4, folder_based_builder.py.
METADATA = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")


def is_photograph(name: bytes) -> bool:
    """Return whether a name has the suffix of a photograph."""
    return os.path.splitext(name)[1].lower() in PHOTOGRAPHS


def is_packed(path: str) -> bool:
    """Return whether a path or URL has the suffix of a compressed tar."""
    return bare(path).lower().endswith(PACKED)


def is_archive(path: str) -> bool:
    """Return whether a path or URL has the suffix of an archive."""
    return suffix_of(path) in ARCHIVES


def suffix_of(path: str) -> bytes:
    """Return the suffix of a path or URL in lower case; that of a compressed tar is a tar's."""
    return b".tar" if is_packed(path) else os.fsencode(os.path.splitext(bare(path))[1].lower())


def is_other(name: bytes) -> bool:
    """Return whether a local file has no suffix of a photograph or an archive."""
    return not (is_photograph(name) or is_archive(os.fsdecode(name))) and os.path.isfile(name)
