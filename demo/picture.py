"""Draw what a pack is, from real photographs: tokens end to end, beside the same images padded.

Every colour is the mean of one patch of one photograph; grey is padding.

    python -m demo.picture docs/pictures/pack.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import packvit
from demo.photographs import photographs

PADDING = 225
LINE = 256  # patches in a line of the picture


def main() -> None:
    """Cut the photographs as `packvit embed` does, and draw both ways of laying them out."""
    encoder = packvit.load("tiny", device="cpu")
    # Photographs come in all sizes; these are near each other, so every other one is a thumbnail.
    packs = [
        encoder.pack([path], max_patches=most)
        for path, most in zip(photographs(), (1024, 256, 640, 160) * 2, strict=True)
    ]
    colours = [p.hidden_states.unflatten(1, (-1, 3)).float().mean(1).byte().numpy() for p in packs]
    lengths = [len(colour) for colour in colours]
    tokens, padded = sum(lengths), len(lengths) * max(lengths)

    figure, axes = plt.subplots(
        2, 1, figsize=(9, 3.4), height_ratios=[padded, tokens], constrained_layout=True
    )
    rectangle = np.full((len(lengths), max(lengths), 3), PADDING, np.uint8)
    for row, colour in zip(rectangle, colours, strict=True):
        row[: len(colour)] = colour
    titles = (
        f"padded to the longest: {padded:,} tokens, {1 - tokens / padded:.0%} of them padding",
        f"one pack: {tokens:,} tokens, {len(lengths)} images end to end",
    )
    for axis, stream, title in zip(
        axes, (rectangle.reshape(-1, 3), np.concatenate(colours)), titles, strict=True
    ):
        lines = -(-len(stream) // LINE)
        page = np.full((lines * LINE, 3), 255, np.uint8)
        page[: len(stream)] = stream
        axis.imshow(page.reshape(lines, LINE, 3), aspect="auto", interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_axis_off()
    figure.savefig(Path(sys.argv[1]), dpi=120)


if __name__ == "__main__":
    main()
