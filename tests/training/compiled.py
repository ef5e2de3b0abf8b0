"""Train on packs of mixed sizes with compiled blocks: prints graphs and differences to eager ones.

Run by test_blocks.py, as a process of its own.
"""

import functools
import json
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

import packvit
from packvit.training.blocks import checkpoint_activations

WARM_UP = 4


def main(job: dict[str, Any]) -> None:
    """Compare 20 random packs after warm-up."""
    on_gpu = job["device"] == "cuda"
    torch.compile = functools.partial(torch.compile, backend=job["compiler"])
    plain = packvit.load(job["folder"], device=job["device"])
    encoder = packvit.load(job["folder"], device=job["device"], compile=True)
    if job["lean"]:
        checkpoint_activations(encoder)
    draw = torch.Generator().manual_seed(0)
    graphs, differences = [], []
    for number in range(WARM_UP + 20):
        images = int(torch.randint(2, 7, (), generator=draw))
        sides = torch.randint(1, 9, (images, 2), generator=draw)
        grid = torch.cat([torch.ones(images, 1, dtype=torch.int64), sides], 1)
        tokens = int(grid.prod(1).sum())
        patches = torch.randn(tokens, encoder.config.patch_dim, generator=draw).to(encoder.device)
        gradients = []
        for one in (encoder, plain):
            one.zero_grad()
            one(patches, grid).float().square().mean().backward()
            grads = [p.grad.flatten().float() for p in one.parameters() if p.grad is not None]
            gradients.append(torch.cat(grads))
        if number >= WARM_UP:
            ours, theirs = gradients
            differences.append(((ours - theirs).norm() / theirs.norm()).item())
            graphs.append(counters["stats"]["unique_graphs"])
    limit = 2e-2 if on_gpu else 1e-5
    print(json.dumps({"graphs": graphs, "differences": differences, "limit": limit}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
