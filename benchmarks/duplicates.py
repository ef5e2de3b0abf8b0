"""Which changed copies of photographs `packvit dups` finds, at which threshold.

python -m benchmarks.duplicates [--model NAME] [PHOTOS...]

Every photograph (by default the eight of the demo) is copied in eleven ways. Two are truly alike
if they come from one photograph. Precision is the share of the pairs within groups that are, recall
the share of all such pairs that are within groups, and the recall of a way that of its copy and the
original. The demo has one photograph by both lenses of a stereo camera: pairs of the two count as
wrong.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

import packvit
from demo.photographs import photographs
from packvit.bench.measuring import where
from packvit.retrieval.duplicates import find_duplicates

THRESHOLDS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)

Change = Callable[[Image.Image], Image.Image]


def scaled(by: float) -> Change:
    """Return a change of size."""
    return lambda image: image.resize((round(image.width * by), round(image.height * by)))


def cropped(by: float) -> Change:
    """Return a change that cuts a share of each side off at either end."""

    def change(image: Image.Image) -> Image.Image:
        across, down = round(image.width * by), round(image.height * by)
        return image.crop((across, down, image.width - across, image.height - down))

    return change


WAYS: dict[str, tuple[Change, int]] = {  # the change, and the quality of the JPEG
    "half the size": (scaled(0.5), 90),
    "a quarter the size": (scaled(0.25), 90),
    "twice the size": (scaled(2.0), 90),
    "JPEG of quality 75": (lambda image: image, 75),
    "JPEG of quality 20": (lambda image: image, 20),
    "cropped by 2 % at each side": (cropped(0.02), 90),
    "cropped by 10 %": (cropped(0.1), 90),
    "mirrored": (ImageOps.mirror, 90),
    "half the colour": (lambda image: ImageEnhance.Color(image).enhance(0.5), 90),
    "grey": (lambda image: ImageOps.grayscale(image).convert("RGB"), 90),
    "a third brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.33), 90),
}


def measure(model: str, paths: list[Path], work: Path) -> dict[str, object]:
    """Return precision and recall at every threshold."""
    photos = work / "photos"
    photos.mkdir()
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.save(photos / f"{number:04d} original.png")
        for way, (change, quality) in WAYS.items():
            change(image).save(photos / f"{number:04d} {way}.jpg", quality=quality)
    packvit.embed(photos, out=work / "features", model=model)
    names = sorted(path.name for path in photos.iterdir())
    alike = {pair for pair in combinations(names, 2) if pair[0][:4] == pair[1][:4]}
    results = {}
    for threshold in THRESHOLDS:
        found = find_duplicates(work / "features", threshold=threshold, pixels=False)
        groups = [sorted(member.id for member in group) for group in found.groups]
        pairs = {pair for group in groups for pair in combinations(group, 2)}
        right = len(pairs & alike)
        results[f"{threshold:g}"] = {
            "precision": right / max(1, len(pairs)),
            "recall": right / len(alike),
            "recall_of_ways": {
                way: sum(
                    any(
                        {f"{number:04d} original.png", f"{number:04d} {way}.jpg"} <= set(group)
                        for group in groups
                    )
                    for number in range(len(paths))
                )
                / len(paths)
                for way in WAYS
            },
        }
    return {"model": model, "photographs": len(paths), "copies": len(WAYS), "results": results}


def main() -> None:
    """Print a table on stderr, and one JSON object with machine and results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--model", default="tiny")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(asked.model, asked.photos or photographs(), Path(work))
    results = found["results"]
    assert isinstance(results, dict)
    for threshold, row in results.items():
        ways = "  ".join(f"{way} {share:.2f}" for way, share in row["recall_of_ways"].items())
        print(
            f"{threshold:>6}  precision {row['precision']:.3f}  recall {row['recall']:.3f}  {ways}",
            file=sys.stderr,
        )
    json.dump(where() | found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
