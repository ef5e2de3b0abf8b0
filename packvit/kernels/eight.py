"""To 8 bits: the scale of a row, activations and plain tokens."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from packvit.kernels import operator
from packvit.kernels.activations import KINDS, activate


@triton.jit
def store_8(values, scales, row, column, inside, width, result):
    """Scale a row so that its largest magnitude is 448, the largest of float8_e4m3fn.

    A NaN in the row must reach the scale, which `tl.max` alone would not let it.
    """
    largest = tl.max(tl.where(inside, tl.abs(result), 0.0), 0)
    bad = tl.sum(tl.where(inside & (result != result), 1, 0), 0) > 0
    scale = tl.where(bad, float("nan"), tl.maximum(largest, 1e-12) / 448.0)
    tl.store(scales + row, scale)
    eight = (result * (1.0 / scale)).to(values.dtype.element_ty)
    tl.store(values + row * width + column, eight, mask=inside)


@triton.jit
def activate_8_kernel(
    hidden,
    values,
    scales,
    width,
    kind: tl.constexpr,
    gated: tl.constexpr,
    block: tl.constexpr,
):
    """One row: act(hidden), times its other half where `gated`, in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    if gated:
        pair = tl.arange(0, 2 * block)
        both = tl.load(hidden + row * 2 * width + pair, mask=pair < 2 * width, other=0.0)
        gate, up = tl.split(tl.reshape(both.to(tl.float32), (block, 2)))
        result = activate(gate, kind) * up
    else:
        at = row * width + column
        result = activate(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), kind)
    store_8(values, scales, row, column, inside, width, result)


def like_activate_8(hidden, activation, gated):
    """Return what `activate_8` does, but for its numbers."""
    width = hidden.shape[1] // 2 if gated else hidden.shape[1]
    scales = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
    return hidden.new_empty(len(hidden), width, dtype=torch.float8_e4m3fn), scales


@operator(like_activate_8)
def activate_8(hidden: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor]:
    """Return act(hidden), or act(gate) * up of the two in turns, in 8 bits.

    Shapes: [T, M], or [T, 2 M] where gated, contiguous -> [T, M] float8_e4m3fn, its scale [T, 1].
    """
    width = hidden.shape[1] // 2 if gated else hidden.shape[1]
    values = hidden.new_empty(len(hidden), width, dtype=torch.float8_e4m3fn)
    scales = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
    launch = activate_8_kernel[(len(hidden),)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(
        hidden,
        values,
        scales,
        width,
        kind=KINDS[activation],
        gated=gated,
        block=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return values, scales


@triton.jit
def quantise_kernel(tokens, values, scales, width, block: tl.constexpr):
    """One row to 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    result = tl.load(tokens + row * width + column, mask=inside, other=0.0).to(tl.float32)
    store_8(values, scales, row, column, inside, width, result)


def like_quantise_8(tokens):
    """Return what `quantise_8` does, but for its numbers."""
    values = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    return values, tokens.new_empty(len(tokens), 1, dtype=torch.float32)


@operator(like_quantise_8)
def quantise_8(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens in 8 bits and their scale. Shapes: [T, D], contiguous -> [T, D], [T, 1]."""
    width = tokens.shape[1]
    values = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    scales = tokens.new_empty(len(tokens), 1, dtype=torch.float32)
    launch = quantise_kernel[(len(tokens),)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(tokens, values, scales, width, block=block, num_warps=4 if block <= 2048 else 8)
    return values, scales
