"""One forward of AIMv2-large over mixed sizes: packed, beside transformers one image at a time.

On a GPU: bf16, 24 layers, 52 images of 240 to 1008 patches, and the machine's own ceiling, an
8192 x 8192 x 8192 matmul on N(0, 1) data in the same rounds. On a CPU: fp32, 4 layers, 32 images
of 16 to 400 patches. Weights are random: speed does not depend on them.

    python -m benchmarks.forward > benchmarks/results/forward-cpu.json
"""

import argparse
import json
import random
import sys
from typing import Any

import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from benchmarks.measuring import interleave, where
from packvit.attention import BACKENDS
from packvit.families.aimv2 import AIMv2Packing

BASELINE = "transformers, one image at a time"
SIDE = 8192

Grid = list[tuple[int, int, int]]


def mixed_sizes(images: int, fewest: int, most: int, *, seed: int) -> Grid:
    """Draw images of `fewest` to `most` patches at aspect ratios of 0.5 to 2."""
    draw = random.Random(seed)
    grid: Grid = []
    while len(grid) < images:
        area, aspect = draw.uniform(fewest, most), 2 ** draw.uniform(-1, 1)
        rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if fewest <= rows * columns <= most:
            grid.append((1, rows, columns))
    return grid


def flops(config: Any, grid: Grid) -> float:
    """Return the model's floating-point operations: two for every multiplication and addition."""
    width = config.hidden_size
    linear = 4 * width**2 + 3 * width * config.intermediate_size
    embedding = 3 * config.patch_size**2 * width
    lengths = [rows * columns for _, rows, columns in grid]
    attention = sum(2 * length**2 * width for length in lengths)
    tokens = sum(lengths)
    return 2.0 * (tokens * embedding + config.num_hidden_layers * (tokens * linear + attention))


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    grid = mixed_sizes(*((52, 240, 1008) if on_gpu else (32, 16, 400)), seed=455)
    config = Aimv2VisionConfig(
        is_native=True, use_head=False, num_hidden_layers=24 if on_gpu else 4
    )
    torch.manual_seed(0)
    model = Aimv2VisionModel(config).eval().to(device, dtype)
    images = [torch.randn(1, 3, r * 14, c * 14, device=device, dtype=dtype) for _, r, c in grid]
    encoder = AIMv2Packing.from_transformers(model)
    patches = torch.cat([flatten(image) for image in images])
    grid_thw = torch.tensor(grid)

    def packed(backend: str) -> torch.Tensor:
        encoder.backend = backend
        return encoder(patches, grid_thw)

    def one_by_one() -> list[torch.Tensor]:
        return [model(image).last_hidden_state[0] for image in images]

    able = [b.name for b in BACKENDS if b.obstacle(encoder.workload) is None]
    runs: dict[str, Any] = {f"packvit, {name}": lambda n=name: packed(n) for name in able}
    runs[BASELINE] = one_by_one
    if on_gpu:
        a, b = torch.randn(2, SIDE, SIDE, device=device, dtype=dtype)
        runs["matmul ceiling"] = lambda: a @ b
    with torch.inference_mode():
        theirs = torch.cat(one_by_one()).float()
        worst = {name: (packed(name).float() - theirs).abs().max().item() for name in able}
        results = interleave(runs, rounds=rounds, warmup=3, baseline=BASELINE)
    work = flops(config, grid)
    if on_gpu:
        ceiling = 2 * SIDE**3 / results["matmul ceiling"]["median_ms"] * 1e3
        for name in [*able, "one"]:
            entry = results[BASELINE if name == "one" else f"packvit, {name}"]
            entry["fraction_of_ceiling"] = work / entry["median_ms"] * 1e3 / ceiling
        results["matmul ceiling"]["tflops"] = ceiling / 1e12
    workload = {"images": len(grid), "tokens": len(patches), "tflop": work / 1e12}
    workload |= {
        "dtype": str(dtype),
        "layers": config.num_hidden_layers,
        "threads": torch.get_num_threads(),
    }
    report = where() | {"workload": workload, "rounds": rounds, "baseline": BASELINE}
    json.dump(report | {"results": results, "largest_difference": worst}, sys.stdout, indent=2)
    print()


def flatten(image: torch.Tensor, side: int = 14) -> torch.Tensor:
    """Cut [1, 3, H, W] into patches [T, P], each (row, column, channel)."""
    tiles = image[0].unflatten(1, (-1, side)).unflatten(3, (-1, side))
    return tiles.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


if __name__ == "__main__":
    main()
