"""Read what lies beside a photograph: photo.json, photo.txt or photo.cls by photo.jpg. No torch."""

import os

from packvit.corpus.inputs import limits
from packvit.corpus.inputs.kept import NUMBERS, OBJECTS, TEXTS, Keeping
from packvit.corpus.inputs.reader import open_source
from packvit.images.errors import ImageError

EXTENSIONS = (*OBJECTS, *TEXTS, *NUMBERS)
SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)


def read_beside(path: bytes, keeping: Keeping) -> str | None:
    """Return the values to keep in the files beside a local photograph, as lines of JSON."""
    lines = []
    for extension in EXTENSIONS if keeping else ():
        name = f"{os.fsdecode(os.path.splitext(path)[0])}.{extension}"
        if os.path.lexists(name) and keeping.wants_member(extension):
            where = os.fsencode(name).decode("utf-8", "backslashreplace")
            lines.append(keeping.read(extension, read_small(name), where))
    return "\n".join(line for line in lines if line) or None


def read_small(path: str) -> bytes | None:
    """Return the first bytes of a file, one more than is kept; None if it cannot be read."""
    try:
        with open_source(path) as file:
            return file.read(limits.MOST_VALUES + 1)
    except (ImageError, OSError):
        return None
