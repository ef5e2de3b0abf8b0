"""JPEGs to patches: on the GPU, beside Pillow on all cores, and how many pixels differ.

Photographs of scikit-image and scikit-learn, scaled to about 1.2 MP, saved as JPEG 4:2:0 of quality
90; patches of 14 pixels, at most 1024 an image. The differences are counted over these and over
all qualities, subsamplings, orientations and odd sizes of the tests, with three ways to resize.

    python -m benchmarks.decoding > benchmarks/results/decoding-h100.json
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from benchmarks.measuring import interleave, where
from demo.photographs import photographs
from packvit.config import Exact, ImageConfig, ShortestEdge
from packvit.gpu.decoder import JpegDecoder
from packvit.gpu.jpeg import JpegPlan, plan_jpeg
from packvit.gpu.nvjpeg import NvJpegError
from packvit.images import decode
from packvit.preprocessing import to_patches

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic")
SIZINGS = (None, Exact(224, 224), ShortestEdge(256, (224, 224)))
PIXELS = 1280 * 960
THREADS = min(16, os.cpu_count() or 1)


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="JPEGs to patches, on the GPU and by Pillow.")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    files = [large(photos[i % len(photos)], i) for i in range(options.images)]
    plans = plan(files, IMAGES)
    runs: dict[str, Callable[[], object]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        name = f"Pillow, {THREADS} threads"
        runs[name] = lambda: list(pool.map(by_pillow, files))
        for backend in ("hardware", "cuda"):
            try:
                decoder = JpegDecoder(IMAGES, "hwc", torch.device("cuda"), backend=backend)
            except NvJpegError:
                continue  # a GPU without the engine
            runs[f"nvJPEG, {backend}"] = lambda d=decoder: d.decode(files, plans)
        results = interleave(runs, rounds=options.rounds, warmup=2, baseline=name)
    for result in results.values():
        result["images_per_second"] = options.images / result["median_ms"] * 1e3
    report = where() | {
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "workload": {
            "images": len(files),
            "megapixels_each": PIXELS / 1e6,
            "bytes_each": sum(map(len, files)) // len(files),
            "patches": sum(plan.patches for plan in plans),
        },
        "rounds": options.rounds,
        "baseline": name,
        "results": results,
        "host_plan_microseconds": host_cost(files),
        "differences": differences(photos, [n.split(", ")[1] for n in runs if "nv" in n]),
    }
    json.dump(report, sys.stdout, indent=2)
    print()


def large(photo: Image.Image, number: int) -> bytes:
    """Return a photograph at PIXELS, of a size and a content that no other image has."""
    scale = (PIXELS / (photo.width * photo.height)) ** 0.5
    width, height = round(photo.width * scale) - number % 7, round(photo.height * scale)
    return saved(photo.resize((width, height), Image.Resampling.LANCZOS), quality=90)


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return the bytes of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def plan(files: Sequence[bytes], images: ImageConfig) -> list[JpegPlan]:
    """Return the plans of files that are all fit for the GPU."""
    plans = [plan_jpeg(file, images) for file in files]
    kept = [plan for plan in plans if isinstance(plan, JpegPlan)]
    assert len(kept) == len(files), plans
    return kept


def by_pillow(file: bytes, images: ImageConfig = IMAGES) -> np.ndarray:
    """Return what the host makes of a file."""
    return to_patches(decode(file).image, images).patches


def host_cost(files: Sequence[bytes]) -> float:
    """Return the median microseconds that one file's plan takes on one core."""
    from time import perf_counter

    taken = []
    for file in files:
        start = perf_counter()
        plan_jpeg(file, IMAGES)
        taken.append(perf_counter() - start)
    return float(np.median(taken)) * 1e6


def variants(photos: Sequence[Image.Image]) -> dict[str, list[bytes]]:
    """Return photographs by subsampling, in several qualities, orientations and odd sizes."""
    kinds: dict[str, list[bytes]] = {"4:4:4": [], "4:2:2": [], "4:2:0": [], "grey": []}
    for number, photo in enumerate(photos):
        image = photo.crop((0, 0, photo.width - number % 5, photo.height - number % 4))
        for place, quality in enumerate((10, 50, 75, 85, 95, 100)):
            exif = Image.Exif()
            exif[0x0112] = (number + place) % 8 + 1
            for subsampling, name in enumerate(("4:4:4", "4:2:2", "4:2:0")):
                file = saved(image, quality=quality, exif=exif, subsampling=subsampling)
                kinds[name].append(file)
            kinds["grey"].append(saved(image.convert("L"), quality=quality, exif=exif))
    return kinds


def differences(photos: Sequence[Image.Image], backends: Sequence[Any]) -> list[dict[str, Any]]:
    """Count images and values of patches that are not Pillow's."""
    found = []
    for name, files in variants(photos).items():
        for sizing in SIZINGS:
            images = ImageConfig(14, HALF, HALF, "bicubic", sizing)
            plans = plan(files, images)
            theirs = [by_pillow(file, images) for file in files]
            for backend in backends:
                decoder = JpegDecoder(images, "hwc", torch.device("cuda"), backend=backend)
                decoded = decoder.decode(files, plans)
                lengths = [plan.patches for plan in plans]
                ours = [part.numpy() for part in decoded.patches.cpu().split(lengths)]
                pairs = list(zip(ours, theirs, strict=True))
                gaps = [abs(o.astype(int) - t).max() for o, t in pairs]
                found.append(
                    {
                        "subsampling": name,
                        "sizing": str(sizing),
                        "backend": backend,
                        "images": len(files),
                        "refused_by_nvjpeg": len(decoded.failed),
                        "images_that_differ": sum(gap > 0 for gap in gaps),
                        "values": sum(t.size for t in theirs),
                        "values_that_differ": int(sum((o != t).sum() for o, t in pairs)),
                        "largest_difference": int(max(gaps)),
                    }
                )
    return found


if __name__ == "__main__":
    main()
