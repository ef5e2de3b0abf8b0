"""Where compiled kernels are kept between processes: FlashAttention-4's and Triton's."""

import os
import tempfile
from functools import cache
from pathlib import Path

# What a folder is named by, and whether it is kept at all, each read once at the first import.
FLASH_ATTENTION = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
FLASH_ATTENTION_ON = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
TRITON = "TRITON_CACHE_DIR"


def cache_folder() -> Path:
    """Return packvit's cache folder: $PACKVIT_CACHE, else `packvit` in the user's cache folder."""
    if chosen := os.environ.get("PACKVIT_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "packvit"


@cache
def keep_kernels() -> Path | None:
    """Have compiled kernels kept in packvit's cache folder, and return it; once a process.

    flash-attn-4 compiles a kernel in 8 s, and by itself keeps none. What the user has set stays.
    Both caches may be used by many processes at once: they write under a temporary name and rename,
    and name what they keep by sources, versions and GPU architecture. None, and nothing is kept,
    where the folder cannot be written.

    Source: flash-attn-4 4.0.0b36, `flash_attn/cute/cache_utils.py`; Triton 3.6, `knobs.py`.
    """
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # no home, a read-only one, or a full disk
        return None
    os.environ.setdefault(FLASH_ATTENTION_ON, "1")
    os.environ.setdefault(FLASH_ATTENTION, str(folder / "flash_attention"))
    os.environ.setdefault(TRITON, str(folder / "triton"))
    return folder
