"""What do checkpointed activations save, and cost? Memory and time of a training step, as JSON.

    python -m benchmarks.training --model aimv2-large
    OMP_NUM_THREADS=2 python -m benchmarks.training --layers 12 --images 3

Both contenders are one encoder with random weights, on a pack of the sizes that `packvit bench`
calls mixed; they take turns. On a GPU it is bf16 and all 52 images. Activation memory is the most
that a step holds on top of what stood before it, as torch's allocator or its profiler saw it.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from packvit.bench import measuring
from packvit.bench.models import MODELS, random_model
from packvit.bench.workloads import mixed_sizes
from packvit.encoder import Encoder
from packvit.training.blocks import checkpoint_activations

KEPT, CHECKPOINTED = "kept", "checkpointed"


def peak(step: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that a step holds at most on top of what was there before."""
    on_gpu = measuring.peak_bytes(step, device)
    if on_gpu is not None:
        return on_gpu
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def main() -> None:
    """Time both, in turn, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*MODELS], default="aimv2-large")
    parser.add_argument("--layers", type=int, help="Cut the model to so many.")
    parser.add_argument("--images", type=int, default=52)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = random_model(options.model, options.layers, device, dtype)
    plain = model.encoder.from_transformers(model.reference).train()
    lean = copy.deepcopy(plain)
    checkpoint_activations(lean)
    grid = mixed_sizes(options.images, 240, 1008)
    tokens = sum(frames * rows * columns for frames, rows, columns in grid)
    patches = torch.randn(tokens, model.config.patch_dim, device=device, dtype=dtype)

    def train(encoder: Encoder) -> None:
        encoder(patches, torch.tensor(grid)).float().square().mean().backward()

    runs = {KEPT: lambda: train(plain), CHECKPOINTED: lambda: train(lean)}
    for run in runs.values():
        run()  # gradients stand from here on
    memory = {name: peak(run, device) for name, run in runs.items()}
    taken = measuring.interleave(runs, rounds=options.rounds, warmup=1)
    slower = [times[CHECKPOINTED] / times[KEPT] for times in taken]
    report = measuring.where() | {
        "model": options.model,
        "layers": model.config.layers,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "images": len(grid),
        "tokens": tokens,
        "rounds": options.rounds,
        "median_ms": {name: measuring.median_ms(taken, name) for name in runs},
        "activation_bytes": memory,
        "memory_ratio": memory[KEPT] / memory[CHECKPOINTED],
        "time_ratio_quartiles": statistics.quantiles(slower, n=4),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
