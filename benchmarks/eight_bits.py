"""How exact 8 bits can be: which matrices, which format, which scales; emulated on a CPU.

Both operands of a matmul are rounded as a GPU would have them, sums are exact, and what a matmul
gives is rounded to bfloat16. The cosine of a token with float32's: mean, first percentile, least.

    python tests/trained.py /tmp/trained && python -m benchmarks.eight_bits /tmp/trained
    python -m benchmarks.eight_bits aimv2-large --layers 8 --outliers undone
    python -m benchmarks.eight_bits tiny --schemes e4m3 balanced
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import packvit
from demo.photographs import photographs
from packvit.bench.accuracy import pictures, plant
from packvit.bench.measuring import where
from packvit.bench.models import SIZES, random_model
from packvit.bench.workloads import mixed_sizes
from packvit.encoder import Encoder
from packvit.fast.int8 import OUTLIER
from packvit.model.layers import Block, GatedMLP
from packvit.model.norms import Norm

LARGEST = {"e4m3": 448.0, "int8": 127.0}


class Scheme(NamedTuple):
    """How the matrices of a block are rounded. Columns a scale of a row: 0 for all of them."""

    kind: str | None  # None: bfloat16
    tokens: int = 0  # columns a scale, of what a norm gives
    hidden: int = 0  # of what an MLP's second matrix reads
    weights: int = 0
    share: float | None = None  # of a channel's size that goes to the weights that read it
    apart: int = 0  # of a norm's channels, which are multiplied in bfloat16
    out: bool = False  # attention's output projection is in 8 bits too
    hidden_kind: str | None = None  # where another one than `kind`


SCHEMES = {
    "bf16": Scheme(None),
    "e4m3": Scheme("e4m3"),
    "e4m3, out too": Scheme("e4m3", out=True),
    "rows": Scheme("int8"),
    "rows, out too": Scheme("int8", out=True),
    "rows, hidden by 128": Scheme("int8", hidden=128),
    "balanced rows": Scheme("int8", share=0.5),
    "balanced": Scheme("int8", hidden=128, share=0.5),
    "balanced, out too": Scheme("int8", hidden=128, share=0.5, out=True),
    "balanced, hidden e4m3": Scheme("int8", share=0.5, hidden_kind="e4m3"),
    "balanced, hidden by 256": Scheme("int8", hidden=256, share=0.5),
    "balanced, 16 apart": Scheme("int8", hidden=128, share=0.5, apart=16),
    "balanced rows, 16 apart": Scheme("int8", share=0.5, apart=16),
    "balanced, hidden e4m3, 16 apart": Scheme("int8", share=0.5, apart=16, hidden_kind="e4m3"),
    "balanced, 3/4 to the weights": Scheme("int8", hidden=128, share=0.75),
    "balanced, all to the weights": Scheme("int8", hidden=128, share=1.0),
    "by 128": Scheme("int8", 128, 128),
    "both by 128": Scheme("int8", 128, 128, 128),
}


def rounded(x: Tensor, kind: str, columns: int) -> Tensor:
    """Return a matrix as it is in 8 bits, with a scale for each `columns` columns of a row."""
    columns = columns or x.shape[1]
    blocks = F.pad(x, (0, -x.shape[1] % columns)).unflatten(1, (-1, columns))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST[kind]
    held = blocks / scale
    held = held.round() if kind == "int8" else held.to(torch.float8_e4m3fn).float()
    return (held * scale).flatten(1)[:, : x.shape[1]]


class Emulated(nn.Module):
    """A matrix in 8 bits, or in bfloat16 where `kind` is None; `channels` divide what it reads."""

    def __init__(
        self,
        linear: nn.Linear,
        kind: str | None,
        columns: int,
        weights: int,
        channels: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.columns, self.channels, self.apart = kind, columns, channels, apart
        weight = linear.weight.detach()
        weight = weight if channels is None else weight * channels
        if apart is not None:
            self.wide = weight[:, apart].bfloat16().float()
            weight = weight.index_fill(1, apart, 0)
        self.bias, self.weight = linear.bias, self.round(weight, weights)

    def round(self, x: Tensor, columns: int) -> Tensor:
        """Return what a matmul reads."""
        return rounded(x, self.kind, columns) if self.kind else x.bfloat16().float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, in bfloat16."""
        x, more = x if self.channels is None else x / self.channels, 0
        if self.apart is not None:
            more = F.linear(x[:, self.apart].bfloat16().float(), self.wide)
            x = x.index_fill(1, self.apart, 0)
        out = F.linear(self.round(x, self.columns), self.weight, self.bias) + more
        return out.bfloat16().float()


def channels_of(norm: Norm, linear: nn.Linear, share: float) -> tuple[Tensor, Tensor]:
    """Return what divides a norm's channels, and multiplies the columns of what reads them; and how
    large the products of each channel are.
    """
    size = norm.weight.detach().float().square()
    if norm.bias is not None:
        size = size + norm.bias.detach().float().square()
    size = size.sqrt()
    column = linear.weight.detach().float().square().mean(0).sqrt()
    least = 1e-6
    size, column = (x.clamp_min(least * x.max().item() + 1e-12) for x in (size, column))
    return size**share / column ** (1 - share), size * column


def parts(encoder: Encoder) -> Iterator[tuple[str, nn.Module, str, nn.Linear, Norm | None]]:
    """Yield what each matrix reads, where it is, itself, and the norm before it."""
    for block in encoder.encoder.layers:
        assert isinstance(block, Block)
        first = "gate_up" if isinstance(block.mlp, GatedMLP) else "up"
        for reads, owner, name, norm in (
            ("tokens", block.attention, "qkv", block.attention_norm),
            ("heads", block.attention, "out", None),
            ("tokens", block.mlp, first, block.mlp_norm),
            ("hidden", block.mlp, "down", None),
        ):
            linear = getattr(owner, name)
            assert isinstance(linear, nn.Linear)
            yield reads, owner, name, linear, norm


def emulate(
    matrices: list[tuple[str, nn.Module, str, nn.Linear, Norm | None]], scheme: Scheme
) -> None:
    """Have the matrices of all blocks as a scheme has them."""
    for reads, owner, name, linear, norm in matrices:
        kind, columns, channels, apart = scheme.kind, scheme.tokens, None, None
        if reads == "heads" and not scheme.out:
            kind = None
        if reads == "hidden":
            kind, columns = scheme.hidden_kind or kind, scheme.hidden
        if norm is not None and scheme.share is not None:
            channels, size = channels_of(norm, linear, scheme.share)
            if scheme.apart and size.max() > OUTLIER * size.median():
                apart = size.topk(scheme.apart).indices
        setattr(owner, name, Emulated(linear, kind, columns, scheme.weights, channels, apart))


def crops() -> list[Image.Image]:
    """Return three crops of each of the demo's photographs."""
    images = []
    for path in photographs():
        photo = Image.open(path).convert("RGB")
        side = min(photo.size) // 2
        for number in range(3):
            left, top = ((edge - side) * number // 2 for edge in photo.size)
            images.append(photo.crop((left, top, left + side, top + side)))
    return images


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description="How exact 8 bits can be.")
    parser.add_argument("model", help=f"a checkpoint's folder or name, or {', '.join(SIZES)}")
    parser.add_argument("--layers", type=int, help="of a random model")
    parser.add_argument("--outliers", choices=["kept", "undone"], help="as `packvit bench` has it")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    asked = parser.parse_args()
    if asked.model in SIZES:
        built = random_model(asked.model, asked.layers, torch.device("cpu"), torch.float32)
        encoder = built.encoder.from_transformers(built.reference)
        grid = mixed_sizes(3, 160, 320)
        pack = (torch.from_numpy(pictures(grid, encoder.config.patch)), torch.tensor(grid))
    else:
        encoder = packvit.load(asked.model, device="cpu", dtype=torch.float32)
        pack = encoder.pack(crops())
    if asked.outliers:
        plant(encoder, undo=asked.outliers == "undone")
    encoder.requires_grad_(False)
    matrices, results = list(parts(encoder)), {}
    with torch.inference_mode():
        wanted = encoder(*pack)
        for name in asked.schemes:
            emulate(matrices, SCHEMES[name])
            cosine = F.cosine_similarity(encoder(*pack), wanted, dim=1)
            results[name] = {
                "mean": round(cosine.mean().item(), 5),
                "p1": round(cosine.quantile(0.01).item(), 5),
                "least": round(cosine.min().item(), 5),
            }
            print(name, results[name], file=sys.stderr)
    report = {"model": asked.model, "layers": asked.layers, "outliers": asked.outliers}
    json.dump(where() | report | {"results": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
