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
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from demo.photographs import photographs
from packvit.bench.measuring import interleave, median_ms, times_faster, where
from packvit.config import Exact, ImageConfig, ShortestEdge
from packvit.gpu.decoder import JpegDecoder
from packvit.gpu.jpeg import JpegPlan, plan_jpeg
from packvit.images.decode import decode
from packvit.images.patches import to_patches

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
        decoder = JpegDecoder(IMAGES, "hwc", torch.device("cuda"))
        runs["GPU"] = lambda: decoder.decode(files, plans)
        taken = interleave(runs, rounds=options.rounds, warmup=2)
    results = {
        each: {
            "median_ms": median_ms(taken, each),
            "times_faster_than_baseline": times_faster(taken, each, name),
            "images_per_second": options.images / median_ms(taken, each) * 1e3,
        }
        for each in runs
    }
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
        "beside_matmuls": beside_matmuls(lambda: decoder.decode(files, plans), len(files)),
        "differences": differences(photos),
    }
    json.dump(report, sys.stdout, indent=2)
    print()


def large(photo: Image.Image, number: int, kind: str = "JPEG") -> bytes:
    """Return a photograph at PIXELS, of a size and a content that no other image has."""
    scale = (PIXELS / (photo.width * photo.height)) ** 0.5
    width, height = round(photo.width * scale) - number % 7, round(photo.height * scale)
    image = photo.resize((width, height), Image.Resampling.LANCZOS)
    return saved(image, kind, quality=90)  # which PNG ignores


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of a file, by default a JPEG."""
    file = io.BytesIO()
    image.save(file, kind, **options)
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


def beside_matmuls(run: Callable[[], object], images: int, seconds: float = 3.0) -> dict[str, Any]:
    """Decode while another thread keeps the SMs busy with large matmuls; both rates, and alone."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)

    def matmuls(until: Callable[[], bool]) -> float:
        start, count = perf_counter(), 0
        while not until():
            for _ in range(8):
                torch.mm(a, b)
            torch.cuda.current_stream().synchronize()
            count += 8
        return count * 2 * 8192**3 / (perf_counter() - start) / 1e12

    def timer() -> Callable[[], bool]:
        end = perf_counter() + seconds
        return lambda: perf_counter() > end

    matmuls(timer())
    alone = matmuls(timer())
    done = Event()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(matmuls, done.is_set)
        start, count, over = perf_counter(), 0, timer()
        while not over():
            run()
            count += 1
        rate = count * images / (perf_counter() - start)
        done.set()
    return {
        "images_per_second": rate,
        "matmul_tflops": beside.result(),
        "matmul_tflops_alone": alone,
    }


def differences(photos: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Count images and values of patches that are not Pillow's."""
    found = []
    for name, files in variants(photos).items():
        for sizing in SIZINGS:
            images = ImageConfig(14, HALF, HALF, "bicubic", sizing)
            plans = plan(files, images)
            with ThreadPoolExecutor(THREADS) as pool:
                theirs = list(pool.map(lambda file, i=images: by_pillow(file, i), files))
            decoded = JpegDecoder(images, "hwc", torch.device("cuda")).decode(files, plans)
            ours = decoded.patches.cpu().split([plan.patches for plan in plans])
            gaps = [abs(o.numpy().astype(int) - t) for o, t in zip(ours, theirs, strict=True)]
            found.append(
                {
                    "subsampling": name,
                    "sizing": str(sizing),
                    "images": len(files),
                    "refused_by_nvjpeg": len(decoded.failed),
                    "images_that_differ": sum(bool(gap.any()) for gap in gaps),
                    "values": sum(gap.size for gap in gaps),
                    "values_that_differ": sum(int((gap > 0).sum()) for gap in gaps),
                    "largest_difference": max(int(gap.max()) for gap in gaps),
                }
            )
    return found


if __name__ == "__main__":
    main()
