"""One forward of AIMv2-large over mixed sizes: packed, beside transformers one image at a time.

On a GPU: bf16, 24 layers, 52 images of 240 to 1008 patches, and the machine's own ceiling, an
8192 x 8192 x 8192 matmul on N(0, 1) data in the same rounds. On a CPU: fp32, 4 layers, 32 images
of 16 to 400 patches. Weights are random: speed does not depend on them.

    python -m benchmarks.forward > benchmarks/results/forward-cpu.json
"""

import argparse
import json
import sys
from typing import Any

import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from benchmarks.measuring import add_ceiling, add_fractions, interleave, where
from benchmarks.workloads import flatten, mixed_sizes, transformer_flops
from packvit.attention import BACKENDS
from packvit.families.aimv2 import AIMv2Packing

BASELINE = "transformers, one image at a time"


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="One forward of AIMv2-large beside its peer.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    grid = mixed_sizes(*((52, 240, 1008) if on_gpu else (32, 16, 400)), seed=455)
    config = Aimv2VisionConfig(
        is_native=True, use_head=False, num_hidden_layers=24 if on_gpu else 4
    )
    torch.manual_seed(0)
    model: Any = Aimv2VisionModel(config)
    model = model.eval().to(device, dtype)
    images = [torch.randn(1, 3, r * 14, c * 14, device=device, dtype=dtype) for _, r, c in grid]
    encoder = AIMv2Packing.from_transformers(model)
    patches = torch.cat([flatten(image, 14) for image in images])
    grid_thw = torch.tensor(grid)

    def packed(backend: str) -> torch.Tensor:
        encoder.backend = backend
        return encoder(patches, grid_thw)

    def one_by_one() -> list[torch.Tensor]:
        return [model(image).last_hidden_state[0] for image in images]

    able = [b.name for b in BACKENDS if b.obstacle(encoder.workload) is None]
    runs: dict[str, Any] = {f"packvit, {name}": lambda n=name: packed(n) for name in able}
    runs[BASELINE] = one_by_one
    add_ceiling(runs, dtype)
    with torch.inference_mode():
        theirs = torch.cat(one_by_one()).float()
        worst = {name: (packed(name).float() - theirs).abs().max().item() for name in able}
        results = interleave(runs, rounds=rounds, warmup=3, baseline=BASELINE)
    work = transformer_flops(
        grid,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        matrices=3,
        mlp_width=config.intermediate_size,
        patch_dim=588,
    )
    add_fractions(results, work)
    workload = {"images": len(grid), "tokens": len(patches), "tflop": work / 1e12}
    workload |= {
        "dtype": str(dtype),
        "layers": config.num_hidden_layers,
        "threads": torch.get_num_threads(),
    }
    report = where() | {"workload": workload, "rounds": rounds, "baseline": BASELINE}
    json.dump(report | {"results": results, "largest_difference": worst}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
