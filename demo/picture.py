"""Draw what a pack is: eight photographs cut into patches, padded, and laid end to end.

Each photograph has a frame of one colour, and its tokens have that colour below; grey is padding.

    python -m demo.picture docs/pictures/pack.png
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

import packvit
from demo.photographs import photographs

MOST = (1024, 256, 640, 160) * 2  # patches; photographs come in all sizes
PADDING = "#d9dde1"
TEXT = "#24292f"


class Photograph(NamedTuple):
    """A photograph as the encoder sees it."""

    image: Any  # [height, width, 3] uint8
    rows: int
    columns: int
    colour: Any

    @property
    def tokens(self) -> int:
        """How many patches it is cut into."""
        return self.rows * self.columns


def read() -> list[Photograph]:
    """Cut the photographs as `packvit embed` does, and put their patches together again."""
    encoder = packvit.load("tiny", device="cpu")
    side, found = encoder.config.patch, []
    for number, (path, most) in enumerate(zip(photographs(), MOST, strict=True)):
        pack = encoder.pack([path], max_patches=most)
        _, rows, columns = pack.grid_thw[0].tolist()
        patches = pack.hidden_states.numpy().reshape(rows, columns, side, side, 3)
        image = patches.swapaxes(1, 2).reshape(rows * side, columns * side, 3)
        colour = plt.colormaps["tab10"](number if number < 7 else 9)  # 7 is the grey of padding
        found.append(Photograph(image, rows, columns, colour))
    return found


def draw_photographs(axis: Any, photos: list[Photograph]) -> None:
    """Draw them in one row, all at the same patch size, with their patches and frames."""
    left, gap = 0.0, 3.5
    tallest = max(photo.rows for photo in photos)
    for photo in photos:
        top = (tallest - photo.rows) / 2
        box = (left, left + photo.columns, top + photo.rows, top)
        axis.imshow(photo.image, extent=box, interpolation="antialiased")
        lines = {"colors": "white", "linewidth": 0.25, "alpha": 0.55}
        axis.hlines(top + np.arange(1, photo.rows), left, left + photo.columns, **lines)
        axis.vlines(left + np.arange(1, photo.columns), top, top + photo.rows, **lines)
        frame = Rectangle(
            (left, top), photo.columns, photo.rows, fill=False, edgecolor=photo.colour, linewidth=3
        )
        axis.add_patch(frame)
        words = f"{photo.rows} x {photo.columns}"
        axis.text(left + photo.columns / 2, -1.2, words, ha="center", fontsize=7.5, color=TEXT)
        left += photo.columns + gap
    axis.set_xlim(-1, left - gap + 1)
    axis.set_ylim(tallest + 1, -3)


def piece(axis: Any, photo: Photograph, start: int, line: float, length: int) -> None:
    """Draw tokens of a photograph as a part of a line, with the photograph where it has room."""
    box = Rectangle(
        (start, line + 0.06), length, 0.88, facecolor=photo.colour, edgecolor="white", linewidth=1
    )
    axis.add_patch(box)
    width = 0.7 * photo.columns / photo.rows * 36  # tokens that are as wide as a line is high
    if length > width + 12:
        thumbnail = Image.fromarray(photo.image).resize((photo.columns * 4, photo.rows * 4))
        left = start + 8
        axis.imshow(
            np.asarray(thumbnail),
            extent=(left, left + width, line + 0.85, line + 0.15),
            aspect="auto",
            zorder=3,
        )


def draw_padded(axis: Any, photos: list[Photograph]) -> None:
    """Draw a line for each photograph, as long as the longest."""
    longest = max(photo.tokens for photo in photos)
    for line, photo in enumerate(photos):
        rest = (photo.tokens, line + 0.06), longest - photo.tokens, 0.88
        axis.add_patch(Rectangle(*rest, facecolor=PADDING, edgecolor="white", linewidth=1))
        piece(axis, photo, 0, line, photo.tokens)
    frame(axis, longest, len(photos))


def draw_pack(axis: Any, photos: list[Photograph]) -> None:
    """Draw all tokens end to end, in lines of the same length."""
    longest = max(photo.tokens for photo in photos)
    place = 0
    for photo in photos:
        left = photo.tokens
        while left:
            line, start = divmod(place, longest)
            length = min(left, longest - start)
            piece(axis, photo, start, line, length)
            place, left = place + length, left - length
    frame(axis, longest, -(-place // longest))


def frame(axis: Any, longest: int, lines: int) -> None:
    """Show so many lines, at the same scale in both pictures."""
    axis.set_xlim(0, longest)
    axis.set_ylim(lines, 0)
    axis.set_aspect("auto")


def main() -> None:
    """Draw the photographs, and both ways of laying them out."""
    photos = read()
    counts = [photo.tokens for photo in photos]
    tokens, padded = sum(counts), len(counts) * max(counts)
    lines = -(-tokens // max(counts))
    figure, axes = plt.subplots(
        3, 1, figsize=(10, 6.4), height_ratios=[5.2, len(photos), lines], layout="constrained"
    )
    titles = (
        "Eight photographs, each cut into patches on a grid of its own",
        f"Padded batch: {padded:,} tokens, {1 - tokens / padded:.0%} of them padding (grey)",
        f"One pack: {tokens:,} tokens end to end, no padding; attention stays within each colour",
    )
    for axis, draw, title in zip(
        axes, (draw_photographs, draw_padded, draw_pack), titles, strict=True
    ):
        draw(axis, photos)
        axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT)
    figure.savefig(Path(sys.argv[1]), dpi=120)


if __name__ == "__main__":
    main()
