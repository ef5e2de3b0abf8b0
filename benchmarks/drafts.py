"""JPEGs decoded as drafts: how far features are from those of whole decoding, and the time saved.

A draft is decoded at 1/2, 1/4 or 1/8 of a photograph's size and then resized as the whole would be;
`left` is how many of its pixels, along a side, go into one of what it is resized to. The features
are compared for each scale and `left`, so that a margin can be chosen: `left` is at least that.

"photographs" are those of scikit-image and scikit-learn, turned, as large as they are and resized
to what `left` says. "mosaics" are crops of them, side by side, as large as the model's own size
asks for; they are sharper than what a camera makes of so many pixels. "drawn" are lines, letters
and noise of single pixels, which no camera makes. JPEGs of quality 90, 4:2:0.

    python -m benchmarks.drafts --model CHECKPOINT > benchmarks/results/drafts.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, features

import packvit
from benchmarks.decoding import saved
from demo.photographs import photographs
from packvit.bench.measuring import where
from packvit.config import ShortestEdge
from packvit.encoder import Encoder
from packvit.images.decode import decode_opened, open_image
from packvit.images.drafts import MARGIN, SCALES, draft
from packvit.images.patches import Cutting, Patches

LEFT = (1.0, 1.5, 2.0, 3.0)
MOST = 4200  # pixels of a drawn image's shorter side
SIZES = {1.2: (960, 1280), 4: (1732, 2309), 12: (3000, 4000)}  # megapixels: height and width
Draw = Callable[[int, int, np.random.Generator], Image.Image]


def main() -> None:
    """Print one JSON object with the machine, the features' distances and the seconds."""
    parser = argparse.ArgumentParser(description="Drafts beside JPEGs decoded whole.")
    parser.add_argument("--model", required=True, help="A trained checkpoint with a fixed size.")
    parser.add_argument("--images", type=int, default=8, help="Of each kind; photographs 4 times.")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    encoder = packvit.load(asked.model, device="cpu", dtype=torch.float32)
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    report = where() | {
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "margin": MARGIN,
        "images": asked.images,
        "features": compare_all(encoder, photos, asked.images),
        "milliseconds_of_one_core": time_all(encoder, photos, asked.rounds),
    }
    json.dump(report, sys.stdout, indent=2)
    print()


def compare_all(
    encoder: Encoder, photos: Sequence[Image.Image], images: int
) -> list[dict[str, Any]]:
    """Return the distances by kind of image, scale and what is left to resize."""
    sizing = encoder.images.sizing
    assert isinstance(sizing, ShortestEdge)
    own = Cutting(encoder.images, encoder.patch_order, None, None)
    found = []
    for left in LEFT:
        files = [saved(turned(photos, n), quality=90) for n in range(4 * images)]
        shrunk = partial(small, encoder, 2, left)
        found.append({"kind": "photographs"} | compare(encoder, files, shrunk, 2, left))
        for name, make in (("mosaics", mosaic(photos)), ("drawn", drawn)):
            for scale in SCALES:
                side = round(sizing.edge * scale * left) + scale // 2  # and no whole pixels
                if side > MOST:
                    continue
                rng = np.random.default_rng(round(10 * left) + scale)
                files = [saved(make(side, side * 4 // 3, rng), quality=90) for _ in range(images)]
                found.append(
                    {"kind": name} | compare(encoder, files, lambda file: own, scale, left)
                )
        print(left, file=sys.stderr, flush=True)
    return found


def compare(
    encoder: Encoder,
    files: Sequence[bytes],
    cutting: Callable[[bytes], Cutting],
    scale: int,
    left: float,
) -> dict[str, Any]:
    """Return how far drafts' patches and features are from those of whole decoding."""
    cosines, gaps = [], []
    for file in files:
        exact, fast = (cut(file, cutting(file), margin) for margin in (None, 0.999 * left))
        gaps.append(abs(exact.patches.astype(int) - fast.patches))
        one, other = (pool(encoder, each) for each in (exact, fast))
        cosines.append(float(torch.cosine_similarity(one, other, dim=0)))
    values = np.concatenate([gap.reshape(-1) for gap in gaps])
    return {
        "scale": scale,
        "left": left,
        "cosine": {
            "mean": float(np.mean(cosines)),
            "p1": float(np.quantile(cosines, 0.01)),
            "least": min(cosines),
        },
        "pixels": {
            "mean": float(values.mean()),
            "p99": float(np.quantile(values, 0.99)),
            "largest": int(values.max()),
        },
    }


def cut(file: bytes, cutting: Cutting, margin: float | None) -> Patches:
    """Return a JPEG's patches as a decode worker makes them, by a draft if a margin is given."""
    opened = open_image(file)
    whole = None if margin is None else draft(opened, cutting, margin)
    return cutting.cut(decode_opened(opened).image, whole)


def pool(encoder: Encoder, cut: Patches) -> torch.Tensor:
    """Return the pooled feature of an image."""
    with torch.inference_mode():
        found = encoder.encode(torch.from_numpy(cut.patches), [[1, cut.rows, cut.columns]])
    assert found.pooled is not None
    return found.pooled[0].double()


def small(encoder: Encoder, scale: int, left: float, file: bytes) -> Cutting:
    """Return the preprocessing that resizes a photograph so that a draft has `left` to resize."""
    images, patch = encoder.images, encoder.images.patch
    edge = int(min(open_image(file).image.size) / scale / left)
    side = edge // patch * patch
    sized = replace(images, sizing=ShortestEdge(edge, (side, side)))
    return Cutting(sized, encoder.patch_order, None, None)


def turned(photos: Sequence[Image.Image], number: int) -> Image.Image:
    """Return a photograph, turned and mirrored in another way for each round of all."""
    photo, turn = photos[number % len(photos)], number // len(photos)
    return photo.transpose(list(Image.Transpose)[turn % 7]) if turn else photo


def mosaic(photos: Sequence[Image.Image]) -> Draw:
    """Return what draws crops of photographs side by side, pixel for pixel."""

    def make(height: int, width: int, rng: np.random.Generator) -> Image.Image:
        image = Image.new("RGB", (width, height))
        for top in range(0, height, 280):
            for left in range(0, width, 280):
                photo = photos[int(rng.integers(len(photos)))]
                x, y = (int(rng.integers(side - 279)) for side in photo.size)
                image.paste(photo.crop((x, y, x + 280, y + 280)), (left, top))
        return image

    return make


def drawn(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Return thin lines and letters on two colours, and a field of noise."""

    def colour() -> tuple[int, int, int]:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        return red, green, blue

    def place() -> tuple[int, int]:
        return int(rng.integers(width)), int(rng.integers(height))

    image = Image.new("RGB", (width, height), colour())
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width // 2, height), fill=colour())
    for _ in range(200):
        pen.line((place(), place()), fill=colour())
    for _ in range(height * width // 20_000):
        pen.text(place(), "packs of patches")
    noise = rng.integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    image.paste(Image.fromarray(noise), (width // 3, height // 3))
    return image


def time_all(encoder: Encoder, photos: Sequence[Image.Image], rounds: int) -> list[dict[str, Any]]:
    """Return the CPU time of preparing an image, whole and as a draft, in turns."""
    order = encoder.patch_order
    settings = {
        "224": Cutting(encoder.images, order, None, None),
        "650 patches": Cutting(encoder.images, order, "native", 650),
    }
    found = []
    for megapixels, size in SIZES.items():
        file = saved(mosaic(photos)(*size, np.random.default_rng(0)), quality=90)
        camera = photos[0].resize((size[1], size[0]), Image.Resampling.BICUBIC)
        for kind, data in (("mosaic", file), ("enlarged", saved(camera, quality=90))):
            for name, cutting in settings.items():
                taken: dict[str, list[float]] = {"pil": [], "fast": []}
                for _ in range(rounds):
                    for way, margin in (("pil", None), ("fast", MARGIN)):
                        start = process_time()
                        cut(data, cutting, margin)
                        taken[way].append((process_time() - start) * 1e3)
                row = {way: median(times) for way, times in taken.items()}
                row = {"megapixels": megapixels, "kind": kind, "to": name} | row
                found.append(row | {"bytes": len(data)})
    return found


if __name__ == "__main__":
    main()
