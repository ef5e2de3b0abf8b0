"""How a matrix meets tokens: as it is, in steady numbers of rows, or in 8 bits.

Libraries choose a matmul's kernel by its number of rows, so the same token may come out with other
bits in a larger pack. `make_steady` is the way out. In 16 bits on CUDA only few rows are split
along the sum (split-K), so a floor on the rows is enough, which the needle tests hold us to;
elsewhere every matmul is given the same number of rows.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LARGEST_8 = 448.0  # of float8_e4m3fn
FLOOR = 2048  # rows on CUDA: one matmul of AIMv2-large's smallest matrix fills an H100
ROWS = 256  # of every matmul on a CPU


class Linear(nn.Linear):
    """A linear layer whose rows can be kept from knowing how many others there are."""

    steady: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias. Shapes: [T, D] -> [T, features]."""
        return affine(input, self.weight, self.bias, self.steady)


def affine(tokens: Tensor, weight: Tensor, bias: Tensor | None, steady: bool) -> Tensor:
    """Return tokens @ weight.T + bias, a row's bits not knowing of other rows where `steady`."""
    if not steady or tokens.ndim != 2:
        return F.linear(tokens, weight, bias)
    if tokens.is_cuda and tokens.dtype != torch.float32:
        return F.linear(fill(tokens, max(FLOOR, len(tokens))), weight, bias)[: len(tokens)]
    rows = FLOOR if tokens.is_cuda else ROWS
    filled = fill(tokens, -(-len(tokens) // rows) * rows)
    parts = [F.linear(part, weight, bias) for part in filled.split(rows)]
    return torch.cat(parts)[: len(tokens)]


def add_affine(stream: Tensor, tokens: Tensor, weight: Tensor, steady: bool) -> Tensor:
    """Return stream + tokens @ weight.T in 16 bits, written where `stream` is if it can be.

    Rounded once, from the sums. A row's bits do not know of other rows where `steady`.
    """
    if steady and len(tokens) < FLOOR:
        return torch.addmm(fill(stream, FLOOR), fill(tokens, FLOOR), weight.t())[: len(tokens)]
    return stream.addmm_(tokens, weight.t())


def fill(tokens: Tensor, rows: int) -> Tensor:
    """Fill up with zeros. Shapes: [T, D] -> [rows, D]."""
    missing = rows - len(tokens)
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def make_steady(module: nn.Module) -> None:
    """Let no linear layer of `module` give a row other bits for the rows beside it."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.steady = True


class Rows8(NamedTuple):
    """Tokens in 8 bits, each scaled by itself: values * scale is what they stand for."""

    values: Tensor  # [T, D] float8_e4m3fn
    scale: Float[Tensor, "T 1"]


def quantise(tokens: Tensor) -> Rows8:
    """Return every row scaled so that its largest magnitude is the largest of 8 bits.

    The plain twin of `kernels.eight.quantise_8`, for weights. Numbers of 8 bits keep 3 bits of
    mantissa down to 1 / 28,672 of a row's largest, which is why an outlier channel does not drown
    its row as it would in integers.
    """
    values = tokens.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST_8
    return Rows8((values / scale).to(torch.float8_e4m3fn), scale)


class Linear8(nn.Module):
    """A linear layer in 8 bits: weights scaled output by output, tokens row by row. Inference only.

    Source: the row-wise recipe of torch's own scaled matmul (`torch._scaled_mm`).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, tokens: Tensor | Rows8) -> Tensor:
        """Return tokens @ weight.T + bias in bfloat16. Shapes: [T, D] -> [T, features]."""
        if not isinstance(tokens, Rows8):
            from packvit.kernels.eight import quantise_8

            tokens = Rows8(*quantise_8(tokens))
        values, scale = tokens
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] # its only name
            values,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def float8_obstacle(module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the matrices of `module` cannot be of 8 bits, or None; completes "fp8 ..."."""
    if device.type != "cuda":
        return f"needs a CUDA device and the encoder is on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (9, 0):
        return f"needs compute capability 9.0 and {device} is older"
    if dtype != torch.bfloat16:
        return f"computes beside bfloat16 and the encoder is in {dtype}"
    for layer in module.modules():
        if isinstance(layer, Linear) and (layer.in_features % 16 or layer.out_features % 16):
            return (
                "needs matrices whose sides are divisible by 16 and this encoder has one of "
                f"{layer.out_features} x {layer.in_features}"
            )
    return None


def to_float8(module: nn.Module, keep: Collection[str] = ()) -> None:
    """Replace every linear layer of `module` by one in 8 bits, but for those named in `keep`."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear)}
    for name, layer in found.items():
        if name not in keep:
            module.set_submodule(name, Linear8(layer), strict=True)
