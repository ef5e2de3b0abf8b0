"""What do checkpointed activations save, and cost? Memory and time of a training step, as JSON.

    python -m benchmarks.training --model aimv2-large

Both contenders are one encoder with random weights, bf16, on the pack of 52 images that
`packvit bench` has; they take turns. Activation memory is the peak of a step less what
stood before it.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import packvit
from packvit.encoder import Encoder
from packvit.training.blocks import checkpoint_activations

ROUNDS = 7


def build(model: str) -> Encoder:
    """Return an encoder of a published shape on the GPU, its weights random."""
    from transformers import (
        Aimv2VisionConfig,
        Aimv2VisionModel,
        Siglip2VisionConfig,
        Siglip2VisionModel,
    )

    if model == "aimv2-large":
        theirs = Aimv2VisionModel(Aimv2VisionConfig(is_native=True, use_head=False))
        encoder = packvit.AIMv2Packing.from_transformers(theirs)
    else:
        config = Siglip2VisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
        )
        encoder = packvit.Siglip2NaflexPacking.from_transformers(Siglip2VisionModel(config))
    return encoder.to("cuda", torch.bfloat16).train()


def draw_grid(images: int = 52) -> Tensor:
    """Return images of 240 to 1008 patches, aspect ratios 0.5 to 2, from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    patches = torch.randint(240, 1009, (images,), generator=draw)
    aspects = 2 ** (2 * torch.rand(images, generator=draw) - 1)
    rows = (patches / aspects).sqrt().round().clamp(min=1).long()
    return torch.stack([torch.ones_like(rows), rows, patches // rows], 1)


def measure(step: Callable[[], None]) -> tuple[float, int]:
    """Return one step's milliseconds and the bytes it needed at most beyond what stood before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Time both, in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["aimv2-large", "so400m"], default="aimv2-large")
    plain = build(parser.parse_args().model)
    lean = copy.deepcopy(plain)
    checkpoint_activations(lean)
    grid = draw_grid()
    tokens = int(grid.prod(1).sum())
    patches = torch.randn(tokens, plain.config.patch_dim, device="cuda", dtype=torch.bfloat16)

    def train(encoder: Encoder) -> None:
        encoder(patches, grid).float().square().mean().backward()

    contenders = {"kept": plain, "checkpointed": lean}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 2):
        for name, encoder in contenders.items():
            if turn == 0:
                train(encoder)  # gradients stand from here on
                continue
            taken = measure(lambda encoder=encoder: train(encoder))
            if turn > 1:
                found[name].append(taken)
    results = {
        name: {
            "milliseconds": statistics.median(time for time, _ in rows),
            "activation_bytes": statistics.median(memory for _, memory in rows),
        }
        for name, rows in found.items()
    }
    kept, less = results["kept"], results["checkpointed"]
    print(
        json.dumps(
            {
                "machine": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "model": parser.parse_args().model,
                "tokens": tokens,
                "results": results,
                "memory_ratio": kept["activation_bytes"] / less["activation_bytes"],
                "time_ratio": less["milliseconds"] / kept["milliseconds"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
