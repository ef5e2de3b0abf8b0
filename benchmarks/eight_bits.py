"""How exact 8 bits can be: which matrices, which format, which scales; emulated on a CPU.

Both operands of a matmul are rounded as a GPU would have them, sums are exact, and what a matmul
gives is rounded to bfloat16. Rows are scaled to their largest value, or each 128 columns of them.
The cosine of a token with float32's: mean, first percentile, least; of the pooled vector the least.

    python tests/trained.py /tmp/trained && python -m benchmarks.eight_bits /tmp/trained
    python -m benchmarks.eight_bits tiny --format e4m3 --parts attention.qkv mlp.gate_up
"""

import argparse
import json
import sys
from collections.abc import Collection

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import packvit
from demo.photographs import photographs
from packvit.bench.measuring import where
from packvit.encoder import Encoder

PARTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.gate_up", "mlp.down")
LARGEST = {"e4m3": 448.0, "int8": 127.0}


def rounded(x: Tensor, kind: str, columns: int) -> Tensor:
    """Return a matrix as it is in 8 bits, with a scale for each `columns` columns of a row."""
    blocks = F.pad(x, (0, -x.shape[1] % columns)).unflatten(1, (-1, columns))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST[kind]
    held = blocks / scale
    held = held.round() if kind == "int8" else held.to(torch.float8_e4m3fn).float()
    return (held * scale).flatten(1)[:, : x.shape[1]]


class Emulated(nn.Module):
    """A matrix in 8 bits, or in bfloat16 where `kind` is None."""

    def __init__(self, linear: nn.Linear, kind: str | None, columns: int | None) -> None:
        super().__init__()
        self.kind, self.columns = kind, columns or linear.in_features
        self.bias, self.weight = linear.bias, self.round(linear.weight.detach())

    def round(self, x: Tensor) -> Tensor:
        """Return what a matmul reads."""
        return rounded(x, self.kind, self.columns) if self.kind else x.bfloat16().float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, in bfloat16."""
        return F.linear(self.round(x), self.weight, self.bias).bfloat16().float()


def emulate(encoder: Encoder, kind: str, columns: int | None, parts: Collection[str]) -> None:
    """Have the named matrices of all blocks in 8 bits, and the others in bfloat16."""
    for block in encoder.encoder.blocks():
        for part in PARTS:
            owner, name = block.get_submodule(part.split(".")[0]), part.split(".")[1]
            if isinstance(linear := getattr(owner, name, None), nn.Linear):
                setattr(owner, name, Emulated(linear, kind if part in parts else None, columns))


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="How exact 8 bits can be.")
    parser.add_argument("model", help="a checkpoint's folder or name")
    parser.add_argument("--format", nargs="+", choices=LARGEST, default=list(LARGEST))
    parser.add_argument("--columns", type=int, nargs="+", default=[0, 128], help="0: whole rows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    images = []
    for path in photographs():
        photo = Image.open(path).convert("RGB")
        side = min(photo.size) // 2
        for number in range(3):
            left, top = ((edge - side) * number // 2 for edge in photo.size)
            images.append(photo.crop((left, top, left + side, top + side)))
    exact = packvit.load(asked.model, device="cpu", dtype=torch.float32)
    pack = exact.pack(images)
    results = {}
    with torch.inference_mode():
        wanted = exact.encode(pack)
        for kind in asked.format:
            for columns in asked.columns:
                encoder = packvit.load(asked.model, device="cpu", dtype=torch.float32)
                emulate(encoder, kind, columns or None, asked.parts)
                found = encoder.encode(pack)
                cosine = F.cosine_similarity(found.tokens, wanted.tokens, dim=1)
                results[f"{kind}, {columns or 'all'} columns a scale"] = {
                    "mean": cosine.mean().item(),
                    "p1": cosine.quantile(0.01).item(),
                    "least": cosine.min().item(),
                    "pooled, least": F.cosine_similarity(found.vectors(), wanted.vectors())
                    .min()
                    .item(),
                }
    report = {"model": asked.model, "images": len(images), "parts": asked.parts}
    json.dump(where() | report | {"results": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
