"""Contact sheets of what was found in feature folders: the hits of a search, with their scores."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from textwrap import wrap

from PIL import Image, ImageDraw

from packvit.corpus.inputs.sources import Input
from packvit.images.decode import load_image
from packvit.images.errors import ImageError
from packvit.pictures.colours import BLANK
from packvit.pictures.draw import check_out, write_picture
from packvit.pictures.maps import count
from packvit.pictures.neighbours import THUMBNAIL
from packvit.pictures.sheet import INK, WIDTH, Panel, draw_sheet, font
from packvit.retrieval.duplicates import Duplicates, Member
from packvit.retrieval.photographs import find_inputs, load_photograph
from packvit.retrieval.queries import Query
from packvit.retrieval.search import Found, Hit

MOST = 140  # pictures on a sheet
ACROSS = 12  # pictures of a group
TILE, LETTERS = (THUMBNAIL, THUMBNAIL * 3 // 4), 48  # of a query's words: its size, and the font's


@dataclass(slots=True)
class Thumbnails:
    """Small pictures of rows; one that cannot be read is blank, and its path kept in `lost`."""

    inputs: dict[str, Input]  # by path
    lost: list[str] = field(default_factory=list)

    def __getitem__(self, path: str) -> Image.Image:
        try:
            image = load_photograph(self.inputs[path])
        except ImageError:
            if path not in self.lost:
                self.lost.append(path)
            return Image.new("RGB", TILE, (BLANK,) * 3)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image


def draw_hits(found: Found, *, width: int = WIDTH) -> tuple[Image.Image, list[str]]:
    """Return a sheet of each query and its hits, and the paths of those that cannot be read.

    Hits beyond `MOST` pictures are left out.
    """
    shown = [hits[: max(1, MOST // len(found.hits) - 1)] for hits in found.hits]
    paths = [hit.path for hits in shown for hit in hits]
    thumbnails = Thumbnails(find_inputs(paths, found.image_column))
    panels = list(hit_panels(found, shown, thumbnails))
    many = len(found.queries)
    title = (
        f"{many} {'query' if many == 1 else 'queries'}, each before its nearest of {found.rows:,} "
        "photographs by the cosine of their vectors"
    )
    return draw_sheet(title, panels, width=width), thumbnails.lost


def write_hits(found: Found, out: str, *, width: int = WIDTH) -> list[str]:
    """Write the sheet of `draw_hits`; return the paths of those that cannot be read.

    Raises: UsageError if `out` is one of the photographs; WriteError.
    """
    target = check_picture(out, [hit.path for hits in found.hits for hit in hits])
    sheet, lost = draw_hits(found, width=width)
    write_picture(sheet, target)
    return lost


def check_picture(out: str, photographs: Iterable[str]) -> Path:
    """Return the path of a sheet.

    Raises: UsageError if it is not a picture's, or would replace a photograph or another file.
    """
    return check_out(out, [Input(path, path) for path in photographs if os.path.isfile(path)])


def hit_panels(
    found: Found, shown: Sequence[Sequence[Hit]], thumbnails: Thumbnails
) -> Iterator[Panel]:
    """Yield a panel for each query, and for each of its hits."""
    for query, hits in zip(found.queries, shown, strict=True):
        named = query.typed if len(query.terms) > 1 else PurePath(query.typed).name
        yield Panel((draw_query(query),), (named,))
        for hit in hits:
            caption = f"{hit.score:.3f}  {PurePath(hit.id).name}"
            yield Panel((thumbnails[hit.path],), (caption,))


def write_groups(found: Duplicates, out: str, *, width: int = WIDTH) -> list[str]:
    """Write a sheet of the groups of duplicates; return the paths of those that cannot be read.

    Groups beyond `MOST` pictures are left out, and of a group those beyond `ACROSS`.

    Raises: UsageError if `out` is one of the photographs; WriteError.
    """
    target = check_picture(out, [member.path for group in found.groups for member in group])
    shown: list[tuple[Member, ...]] = []
    for group in found.groups:
        if sum(map(len, shown)) + min(ACROSS, len(group)) > MOST:
            break
        shown.append(group[:ACROSS])
    paths = [member.path for group in shown for member in group]
    thumbnails = Thumbnails(find_inputs(paths, found.image_column))
    panels = [
        Panel(
            tuple(thumbnails[member.path] for member in group),
            tuple(f"{say(member)}  {PurePath(member.id).name}".strip() for member in group),
        )
        for group in shown
    ]
    title = (
        f"{count(len(shown), 'group')} of {len(found.groups):,} in {found.rows:,} photographs; "
        "each before what may be deleted"
    )
    write_picture(draw_sheet(title, panels, width=width), target)
    return thumbnails.lost


def say(member: Member) -> str:
    """Return how a photograph is like the first of its group."""
    if member.match == "near":
        return f"{member.score:.3f}"
    return {"first": "", "bytes": "equal bytes", "pixels": "equal pixels"}[member.match]


def draw_query(query: Query) -> Image.Image:
    """Return a query's photograph, if it is one and nothing else, or its words on white."""
    if len(query.photos) < len(query.terms) or len(query.terms) > 1:
        return draw_words(query.typed)
    image = load_image(query.photos[0]).image
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def draw_words(text: str) -> Image.Image:
    """Return a white picture with a text on it, as much of it as fits."""
    tile = Image.new("RGB", TILE, "white")
    letters = font(LETTERS)
    wide = int(TILE[0] / max(1.0, letters.getlength("n")))
    plain = "".join(c if c.isprintable() else "?" for c in text)
    lines = wrap(plain, wide)[: TILE[1] // (LETTERS + 8)]
    ImageDraw.Draw(tile).multiline_text((8, 8), "\n".join(lines), INK, letters)
    return tile
