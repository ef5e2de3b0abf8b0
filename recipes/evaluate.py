"""Print how well crops find the photograph that they were cut from, as one JSON object.

Of every photograph 20 crops are drawn: 10 to 40 % of its area, sides between 1:2 and 2:1. They are
asked for twice: "plain", pixel for pixel, and "edited", with exposure, white balance, saturation
and contrast changed and half of them mirrored, as people do. Each asks for the nearest of all
photographs by the cosine of pooled vectors: the mean of the tokens, where there is no head.

Beside the encoder stand the same shape untrained, thumbnails and colour histograms, each in
whichever of its variants is best on these very photographs. Intervals hold 95 % of 10,000 draws of
the photographs with replacement.

    python -m recipes.evaluate photographs/test --model tiny
"""

import argparse
import json
from collections.abc import Callable, Sequence
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageEnhance, ImageOps

import packvit
from packvit.encoder import Encoder
from packvit.packs.features import Pack

CROPS = 20
AREA = (0.1, 0.4)  # of the photograph's
ASPECT = 2.0  # the most that one side is longer than the other
DRAWS = 10_000

Describe = Callable[[Image.Image], np.ndarray]
DescribeAll = Callable[[list[Image.Image]], np.ndarray]
Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]


def read_images(folder: Path) -> list[Image.Image]:
    """Return the photographs of a folder in the order of their names."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def draw_crops(photo: Image.Image, draw: np.random.Generator) -> list[Image.Image]:
    """Return 20 crops, sizes and places drawn evenly; one that would not fit is drawn again."""
    crops = []
    while len(crops) < CROPS:
        area = draw.uniform(*AREA) * photo.width * photo.height
        aspect = exp(draw.uniform(-log(ASPECT), log(ASPECT)))
        width, height = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if width <= photo.width and height <= photo.height:
            left = int(draw.integers(photo.width - width + 1))
            top = int(draw.integers(photo.height - height + 1))
            crops.append(photo.crop((left, top, left + width, top + height)))
    return crops


def edit(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Return a crop as someone would pass it on: other light, other colours, perhaps mirrored."""
    gains = 2 ** draw.uniform(-0.5, 0.5) * draw.uniform(0.85, 1.15, 3)
    shades = [min(255, round(shade * gain)) for gain in gains for shade in range(256)]
    image = ImageEnhance.Color(image.point(shades)).enhance(draw.uniform(0.6, 1.4))
    image = ImageEnhance.Contrast(image).enhance(draw.uniform(0.8, 1.2))
    return ImageOps.mirror(image) if draw.random() < 0.5 else image


def draw_questions(photos: Sequence[Image.Image]) -> dict[str, list[Image.Image]]:
    """Return the crops of all photographs, plain and edited, the same at every call."""
    draw = np.random.default_rng(0)
    plain = [crop for photo in photos for crop in draw_crops(photo, draw)]
    return {"plain": plain, "edited": [edit(crop, draw) for crop in plain]}


def make_packs(encoder: Encoder, images: Sequence[Image.Image]) -> list[Pack]:
    """Return packs of images in their order, resized as `packvit embed` does."""
    return [encoder.pack(images[start : start + 16]) for start in range(0, len(images), 16)]


@torch.inference_mode()
def embed(encoder: Encoder, packs: Sequence[Pack]) -> np.ndarray:
    """Return the pooled vector of each image in fp32: [N, D]."""
    pooled = []
    for pack in packs:
        features = encoder.encode(pack.hidden_states, pack.grid_thw)
        if features.pooled is not None:
            pooled.append(features.pooled.float())
        else:
            tokens = features.per_image()
            pooled.append(torch.stack([one.float().flatten(0, 2).mean(0) for one in tokens]))
    return torch.cat(pooled).cpu().numpy()


class Trial:
    """The questions to an encoder, packed once and asked as often as it changes."""

    def __init__(self, encoder: Encoder, photos: Sequence[Image.Image]) -> None:
        self.encoder = encoder
        self.photos = make_packs(encoder, photos)
        questions = draw_questions(photos)
        self.crops = {name: make_packs(encoder, crops) for name, crops in questions.items()}

    def figures(self) -> dict[str, float]:
        """Return retrieval@1 of plain and of edited crops."""
        photos = embed(self.encoder, self.photos)
        similarities = {
            name: cosine(embed(self.encoder, x), photos) for name, x in self.crops.items()
        }
        return {name: round(float(hits(x).mean()), 4) for name, x in similarities.items()}


def hits(similarity: np.ndarray) -> np.ndarray:
    """Return which crops found their photograph: [photographs, 20] from [photographs * 20, ...]."""
    owner = np.arange(len(similarity)) // CROPS
    return (similarity.argmax(1) == owner).reshape(-1, CROPS)


def cosine(crops: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Return the cosine of every crop with every photograph."""
    crops, photos = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (crops, photos))
    return crops @ photos.T


def centred_cosine(crops: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Return the cosine once the mean of all photographs is taken away."""
    return cosine(crops - photos.mean(0), photos - photos.mean(0))


def intersection(crops: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Return how much of every crop's histogram lies within every photograph's."""
    return np.stack([np.minimum(crop, photos).sum(1) for crop in crops])


def thumbnail(side: int) -> Describe:
    """Return a function that gives an image's pixels at side x side."""
    return lambda image: np.asarray(image.resize((side, side)), np.float32).ravel()


def histogram(space: str, bins: int = 8) -> Describe:
    """Return a function that gives the shares of an image's colours in bins x bins x bins."""

    def describe(image: Image.Image) -> np.ndarray:
        if space == "LAB":
            pixels = ImageCms.applyTransform(image, to_lab)
            assert pixels
        else:
            pixels = image.convert(space)
        cells = (np.asarray(pixels).reshape(-1, 3).astype(int) * bins) // 256
        counts = np.bincount(cells @ (bins * bins, bins, 1), minlength=bins**3)
        return (counts / counts.sum()).astype(np.float32)

    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    return describe


def interval(values: np.ndarray) -> list[float]:
    """Return the mean of one value a photograph, and the 95 % interval of redrawn photographs."""
    draw = np.random.default_rng(0)
    means = values[draw.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    return [round(float(x), 4) for x in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def untrained(encoder: Encoder) -> Encoder:
    """Return an encoder of the same shape with the weights that modules are born with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = type(encoder)(encoder.config, encoder.images)
    return twin.to(encoder.device, encoder.dtype).eval()


def answer(
    encoder: Encoder, photos: list[Image.Image], crops: list[Image.Image]
) -> dict[str, dict[str, np.ndarray]]:
    """Return which crops each contender answers rightly: {contender: {variant: hits}}."""

    def judge(describe: DescribeAll, *similarities: Similarity) -> dict[str, np.ndarray]:
        asked, known = describe(crops), describe(photos)
        return {each.__name__: hits(each(asked, known)) for each in similarities}

    def by_encoder(encoder: Encoder) -> DescribeAll:
        return lambda images: embed(encoder, make_packs(encoder, images))

    def one_by_one(describe: Describe) -> DescribeAll:
        return lambda images: np.stack([describe(image) for image in images])

    twin, both = untrained(encoder), (cosine, centred_cosine)
    return {
        "trained": judge(by_encoder(encoder), cosine),
        "untrained": judge(by_encoder(twin), *both),
        "pixels": {
            f"{side} x {side}, {name}": found
            for side in (1, 2, 4, 16)
            for name, found in judge(one_by_one(thumbnail(side)), *both).items()
        },
        "histograms": {
            f"{space}, {bins} bins": judge(one_by_one(histogram(space, bins)), intersection)[
                intersection.__name__
            ]
            for space in ("RGB", "HSV", "LAB")
            for bins in (4, 8, 12)
        },
    }


def compare(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Return retrieval@1 with intervals for the encoder and for what it has to beat."""
    photos = read_images(folder)
    report: dict[str, Any] = {"photographs": len(photos), "crops": len(photos) * CROPS}
    for name, crops in draw_questions(photos).items():
        answers = answer(encoder, photos, crops)
        best = {who: max(tried, key=lambda x: tried[x].mean()) for who, tried in answers.items()}
        values = {who: answers[who][variant].mean(1) for who, variant in best.items()}
        report[name] = {
            "retrieval@1": {who: interval(each) for who, each in values.items()},
            "trained ahead by": {
                who: interval(values["trained"] - each)
                for who, each in values.items()
                if who != "trained"
            },
            "variant": best,
        }
    return report


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path, help="a folder of .jpg files")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    encoder = packvit.load(asked.model, device=asked.device, dtype=getattr(torch, asked.dtype))
    report = {"model": asked.model, "device": str(encoder.device), "dtype": asked.dtype}
    print(json.dumps(report | compare(encoder, asked.photographs), indent=2))


if __name__ == "__main__":
    main()
