"""The photographs behind the rows of a feature folder. No torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import bare, is_url
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.listing import readable
from packvit.corpus.inputs.sources import Input, read
from packvit.corpus.inputs.suffixes import is_archive
from packvit.images.decode import load_image
from packvit.images.errors import ImageError


def load_photograph(source: Input) -> Image.Image:
    """Return the upright RGB pixels of an input.

    Raises: ImageError.
    """
    if source.error:
        code, _ = source.error
        raise ImageError(code, "read")
    return load_image(read(source)).image


def find_inputs(paths: Sequence[str], image_column: str = "image") -> dict[str, Input]:
    """Return the inputs at paths that `roots.place` gave; one that does not exist is `missing`.

    Archives are listed again, each once; `image_column` holds the images of a Parquet file.
    """
    found: dict[str, Input] = {}
    members: dict[str, dict[str, str]] = {}  # paths by the name in the archive, by archive
    for path in paths:
        archive = None if os.path.lexists(path) else find_archive(path)
        if archive is None:
            found[path] = Input(path, path)
        else:
            inner = readable(os.fsencode(path.removeprefix(archive).removeprefix("/")))
            members.setdefault(archive, {})[inner] = path
    for archive, wanted in members.items():
        for one in list_archive(archive, image_column):
            if path := wanted.pop(one.id, None):
                found[path] = Input(path, one.path, one.error, one.within)
        for path in wanted.values():
            found[path] = Input(path, path, ("missing", "read"))
    return found


def find_archive(path: str) -> str | None:
    """Return the archive that a path goes through, or None."""
    if is_url(path):
        parts = bare(path).split("/")
        ends = [end for end, part in enumerate(parts) if is_archive(part)]
        return "/".join(parts[: ends[0] + 1]) if ends and ends[0] < len(parts) - 1 else None
    return next((each for each in above(path) if is_archive(each) and os.path.isfile(each)), None)


def above(path: str) -> Iterator[str]:
    """Yield the folders that a path goes through, the innermost first."""
    return (os.fspath(parent) for parent in Path(path).parents)


def list_archive(archive: str, image_column: str) -> Iterator[Input]:
    """Yield the inputs in an archive, none if it cannot be read."""
    try:
        yield from list_inputs([archive], image_column=image_column)
    except UsageError:
        return
