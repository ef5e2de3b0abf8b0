"""Lay out pictures with captions on one white sheet, using Pillow and its built-in font."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packvit.pictures.colours import ramp

# All in pixels of the sheet.
WIDTH, MARGIN = 1600, 32
APART, TOGETHER = 24, 6  # between panels, and between the pictures of one
# Heights as fractions of the sheet's width: the preferred and the largest height of pictures.
HEIGHT, TALLEST = 0.14, 0.25
WIDEST = 12  # panels in a line at most
TITLE, CAPTION = 20, 14  # sizes of the font
WHITE, INK, PALE = (255, 255, 255), (34, 34, 34), (110, 110, 110)
BAR = (180, 12)  # width and height of a scale's bar


@dataclass(frozen=True, slots=True)
class Panel:
    """Pictures of equal height next to each other, each above its caption."""

    pictures: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    after_first: int = TOGETHER  # pixels between the first picture and the rest

    @property
    def aspect(self) -> float:
        """Width by height of all pictures side by side."""
        return sum(picture.width / picture.height for picture in self.pictures)

    @property
    def gaps(self) -> int:
        """Pixels between the pictures."""
        rest = len(self.pictures) - 2
        return self.after_first + TOGETHER * rest if rest >= 0 else 0


@dataclass(frozen=True, slots=True)
class Line:
    """Panels next to each other, and the height of their pictures."""

    panels: tuple[Panel, ...]
    height: int

    @property
    def width(self) -> int:
        """Pixels from the left of the first picture to the right of the last."""
        return line_gaps(self.panels) + sum(
            width_at(picture, self.height) for panel in self.panels for picture in panel.pictures
        )


def draw_sheet(
    title: str,
    panels: Sequence[Panel],
    *,
    scale: tuple[float, float] | None = None,
    one_a_line: bool = False,
    width: int = WIDTH,
) -> Image.Image:
    """Return a sheet of panels in lines that fill its width.

    `scale` draws the colour bar of `ramp` next to the title, with the values of its ends.
    """
    lines = set_lines(panels, width, one_a_line=one_a_line)
    heading, small = font(TITLE), font(CAPTION)
    below = 2 * CAPTION + APART - 8  # a line's captions, and what parts it from the next
    top = MARGIN + 2 * TITLE
    height = top + sum(line.height + below for line in lines) - (APART - 8) + MARGIN // 2
    right = BAR[0] + 120 if scale else 0
    wide = max(max(line.width for line in lines), int(heading.getlength(title)) + right)
    sheet = Image.new("RGB", (wide + 2 * MARGIN, height), WHITE)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 6), title, INK, heading)
    if scale:
        draw_scale(sheet, pen, small, scale)
    for line in lines:
        left = MARGIN
        for panel in line.panels:
            for index, picture in enumerate(panel.pictures):
                wide = width_at(picture, line.height)
                sheet.paste(fit(picture, (wide, line.height)), (left, top))
                place = (left, top + line.height + 6)
                pen.text(place, shorten(panel.captions[index], small, wide), PALE, small)
                left += wide + (TOGETHER if index else panel.after_first)
            left += APART - TOGETHER
        top += line.height + below
    return sheet


def set_lines(panels: Sequence[Panel], width: int, *, one_a_line: bool) -> list[Line]:
    """Return the lines that fill the width with heights closest to HEIGHT."""
    if one_a_line:
        return [set_line([panel], width) for panel in panels]
    best: list[tuple[float, list[Line]]] = [(0.0, [])]  # of the first 0, 1, 2 ... panels
    for end in range(1, len(panels) + 1):
        ways = []
        for start in range(max(0, end - WIDEST), end):
            line = set_line(panels[start:end], width)
            cost, before = best[start]
            ways.append((cost + log(line.height / width / HEIGHT) ** 2, [*before, line]))
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1]


def set_line(panels: Sequence[Panel], width: int) -> Line:
    """Return a line as wide as the sheet, unless it would be too tall."""
    height = (width - 2 * MARGIN - line_gaps(panels)) / sum(panel.aspect for panel in panels)
    return Line(tuple(panels), max(8, min(int(TALLEST * width), int(height))))


def line_gaps(panels: Sequence[Panel]) -> int:
    """Return the width of all gaps in a line."""
    return sum(panel.gaps for panel in panels) + APART * (len(panels) - 1)


def width_at(picture: Image.Image, height: int) -> int:
    """Return the width of a picture scaled to `height`, at least 1 pixel."""
    return max(1, round(height * picture.width / picture.height))


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture scaled to `size`; a map keeps sharp edges."""
    kind = Image.Resampling.NEAREST if picture.info.get("map") else Image.Resampling.LANCZOS
    return picture.resize(size, kind)


def to_map(colours: np.ndarray) -> Image.Image:
    """Return [rows, columns, 3] bytes as a picture that `fit` enlarges with sharp edges."""
    picture = Image.fromarray(np.ascontiguousarray(colours))
    picture.info["map"] = True
    return picture


def draw_scale(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    small: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    scale: tuple[float, float],
) -> None:
    """Draw the colour bar of `ramp` at the upper right, with the values of its ends."""
    low, high = (f"{end:.2f}" for end in scale)
    wide, tall = BAR
    left = sheet.width - MARGIN - int(small.getlength(high)) - 8 - wide
    bar = np.broadcast_to(ramp(np.linspace(0, 1, wide)), (tall, wide, 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, MARGIN))
    pen.text((left - 8 - small.getlength(low), MARGIN - 3), low, PALE, small)
    pen.text((left + wide + 8, MARGIN - 3), high, PALE, small)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, in this size if Pillow has FreeType."""
    return ImageFont.load_default(size)


def shorten(text: str, small: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return `text` cut to `width` pixels, with dots at the cut."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if small.getlength(text) <= width:
        return text
    while text and small.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""
