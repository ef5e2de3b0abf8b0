"""One forward of SigLIP2-so400m NaFlex over mixed sizes, beside both libraries that pad.

transformers' Siglip2VisionModel and timm's NaFlexVit take the same images padded to the longest,
with a mask, eager and compiled; all with random weights, which speed does not depend on. The
pooling head runs everywhere. Wants a GPU; timm is listed as missing where it is not installed.

    python -m benchmarks.naflex > benchmarks/results/naflex-h200.json
"""

import argparse
import json
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from benchmarks.measuring import add_ceiling, add_fractions, interleave, peak_gib, where
from benchmarks.workloads import Grid, mixed_sizes, pad, transformer_flops
from packvit.attention import BACKENDS
from packvit.families.siglip2 import Siglip2NaflexPacking

SIZE: dict[str, Any] = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}
BASELINE = "transformers, padded"


def timm_runs(padded: Tensor, real: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Any]:
    """Return timm's NaFlexVit, eager and compiled, on the same padded images."""
    if find_spec("timm") is None:
        return {}
    import timm  # pyright: ignore[reportMissingImports] # not beside the CPU build of torch

    model = timm.create_model("naflexvit_so400m_patch16_siglip", num_classes=0)
    model = model.eval().to(padded.device, dtype)
    places = torch.zeros(*padded.shape[:2], 2, dtype=torch.int64)
    for row, (_, rows, columns) in zip(places, grid, strict=True):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        row[: rows * columns] = torch.stack([y, x], -1).flatten(0, 1)
    given = {"patches": padded, "patch_coord": places.to(padded.device), "patch_valid": real}
    compiled = torch.compile(model)
    return {
        "timm NaFlexVit, padded": lambda: model(given),
        "timm NaFlexVit, padded, compiled": lambda: compiled(given),
    }


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="SigLIP2-so400m NaFlex beside padding peers.")
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark wants a CUDA device; on a CPU it would take an hour.")
    device, dtype = torch.device("cuda"), torch.bfloat16
    grid = mixed_sizes(52, 240, 1008, seed=455)
    torch.manual_seed(0)
    model: Any = Siglip2VisionModel(Siglip2VisionConfig(**SIZE))
    model = model.eval().to(device, dtype)
    encoder = Siglip2NaflexPacking.from_transformers(model)
    patches = torch.randn(sum(r * c for _, r, c in grid), 768, device=device, dtype=dtype)
    images = list(patches.split([r * c for _, r, c in grid]))
    padded, real = pad(images)
    shapes, grid_thw = torch.tensor([[r, c] for _, r, c in grid]), torch.tensor(grid)
    compiled = torch.compile(model)

    def packed(backend: str) -> Any:
        encoder.backend = backend
        return encoder.encode(patches, grid_thw)

    def one_by_one() -> list[Any]:
        ones = [torch.ones(1, len(one), device=device) for one in images]
        each = zip(images, ones, shapes.split(1), strict=True)
        return [model(one[None], mask, shape) for one, mask, shape in each]

    able = [b.name for b in BACKENDS if b.obstacle(encoder.workload) is None]
    runs: dict[str, Any] = {f"packvit, {name}": lambda n=name: packed(n) for name in able}
    runs[BASELINE] = lambda: model(padded, real, shapes)
    runs[f"{BASELINE}, compiled"] = lambda: compiled(padded, real, shapes)
    runs["transformers, one image at a time"] = one_by_one
    runs |= timm_runs(padded, real, grid, dtype)
    missing = [] if find_spec("timm") else ["timm"]
    add_ceiling(runs, dtype)
    with torch.inference_mode():
        theirs = torch.cat([out.last_hidden_state[0] for out in one_by_one()]).float()
        worst = {n: (packed(n).tokens.float() - theirs).abs().max().item() for n in able}
        results = interleave(runs, rounds=rounds, warmup=4, baseline=BASELINE)
        for name, run in runs.items():
            results[name]["peak_gib"] = peak_gib(run)
    work = transformer_flops(grid, width=1152, layers=27, matrices=2, mlp_width=4304, patch_dim=768)
    add_fractions(results, work)
    workload = {
        "images": len(grid),
        "tokens": len(patches),
        "padded_tokens": real.numel(),
        "tflop": work / 1e12,
        "dtype": str(dtype),
    }
    report = where() | {"workload": workload, "rounds": rounds, "baseline": BASELINE}
    report |= {"missing": missing, "results": results, "largest_difference": worst}
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
