"""Norms in one pass with the residual that they end, and their derivative."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from packvit.fast.kernels import warps_of
from packvit.fast.kernels.int8 import int8_scale, larger, to_int8

PROGRAMS = 1056  # of a backward: 8 on each of an H100's SMs


@triton.jit
def add_norm_kernel(
    stream,
    delta,
    factor,
    weight,
    bias,
    summed,
    out,
    scales,
    slots,
    apart,
    width,
    eps,
    adds: tl.constexpr,
    scaled: tl.constexpr,
    centred: tl.constexpr,
    int8: tl.constexpr,
    apart_columns: tl.constexpr,
    block: tl.constexpr,
):
    """One row: summed = stream + delta * factor, out = norm(summed): RMS, or layer norm.

    If columns are apart, a column's slot says which of them it is, or -1.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = row * width + column
    x = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        more = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if scaled:
            more *= tl.load(factor + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + more).to(summed.dtype.element_ty)
        tl.store(summed + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if centred:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    result = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if centred:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if apart_columns:
        slot = tl.load(slots + column, mask=inside, other=-1).to(tl.int32)
        there = apart + row * apart_columns + slot
        tl.store(there, result.to(apart.dtype.element_ty), mask=slot >= 0)
        result = tl.where(slot >= 0, 0.0, result)
    if int8:
        scale = int8_scale(tl.reduce(tl.abs(result), 0, larger))
        tl.store(scales + row, scale)
        tl.store(out + at, to_int8(result * (1.0 / scale)), mask=inside)
    else:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def launch_add_norm(
    stream: Tensor,
    delta: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    int8: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch the kernel, and return the sum, which is empty where nothing is added.

    `int8` are the scales, the slots, and the columns apart of `out`, if that is in int8.
    """
    rows, width = stream.shape
    summed = torch.empty_like(stream) if delta is not None else stream.new_empty(0)
    block = triton.next_power_of_2(width)
    launch = add_norm_kernel[(rows,)]  # pyright: ignore[reportIndexIssue]
    launch(
        stream,
        stream if delta is None else delta,
        weight if factor is None else factor,
        weight,
        weight if bias is None else bias,
        summed,
        out,
        *(int8 or (out,) * 3),
        width,
        eps,
        adds=delta is not None,
        scaled=factor is not None,
        centred=bias is not None,
        int8=int8 is not None,
        apart_columns=int8[2].shape[1] if int8 else 0,
        block=block,
        num_warps=warps_of(block),
    )
    return summed


def add_norm(
    stream: Tensor,
    delta: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return stream + delta * factor, or the stream where there is no delta, and its norm.

    One pass over memory. The sum is rounded once, and what is normed is the rounded sum. A bias
    makes it a layer norm; without one it is an RMS norm.

    Shapes: stream, delta [T, D], contiguous; factor, weight, bias [D] -> 2 x [T, D].
    """
    out = torch.empty_like(stream)
    summed = launch_add_norm(stream, delta, factor, weight, bias, eps, out)
    return stream if delta is None else summed, out


def add_norm_int8(
    stream: Tensor,
    delta: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    slots: Tensor,
    apart_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `add_norm`, the norm in int8, with the scale of each row, and some columns apart.

    Those are zeros in int8: `slots` says which of the columns apart a column is, or -1.

    Shapes: as `add_norm`, slots [D] int8 -> the sum; the norm [T, D] int8, its scale [T, 1]
    float32, [T, apart_columns] bfloat16.
    """
    values = torch.empty_like(stream, dtype=torch.int8)
    scales = stream.new_empty(len(stream), 1, dtype=torch.float32)
    apart = stream.new_empty(len(stream), apart_columns, dtype=torch.bfloat16)
    int8 = (scales, slots, apart)
    summed = launch_add_norm(stream, delta, factor, weight, bias, eps, values, int8)
    return stream if delta is None else summed, values, scales, apart


@triton.jit
def add_norm_backward_kernel(
    summed,
    given,
    passed,
    weight,
    out,
    weight_parts,
    bias_parts,
    rows,
    width,
    eps,
    passes: tl.constexpr,
    centred: tl.constexpr,
    block: tl.constexpr,
):
    """Rows in turn: out = passed + the norm's derivative at `given`; its weights' by program."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, block)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((block,), tl.float32)
    bias_sum = tl.zeros((block,), tl.float32)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64) * width + column
        x = tl.load(summed + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(given + at, mask=inside, other=0.0).to(tl.float32)
        if passes:  # asked for before it is needed
            further = tl.load(passed + at, mask=inside, other=0.0).to(tl.float32)
        if centred:
            x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        root = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        normed = x * root
        inner = dy * scale
        dx = inner - normed * (tl.sum(inner * normed, 0) / width)
        if centred:
            dx -= tl.sum(inner, 0) / width
            bias_sum += dy
        dx *= root
        weight_sum += dy * normed
        if passes:
            dx += further  # pyright: ignore[reportPossiblyUnboundVariable]
        tl.store(out + at, dx.to(out.dtype.element_ty), mask=inside)
    at = program.to(tl.int64) * width + column
    tl.store(weight_parts + at, weight_sum, mask=inside)
    if centred:
        tl.store(bias_parts + at, bias_sum, mask=inside)


def add_norm_backward(
    summed: Tensor, given: Tensor, passed: Tensor | None, weight: Tensor, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of what was summed, and of the norm's weight and bias, in one pass.

    `given` is the gradient of the norm's output, `passed` that of the sum where it goes on. Sums
    over tokens are taken in fp32, in an order that is always the same.

    Shapes: summed, given, passed [T, D], contiguous; weight [D] -> [T, D], and float32 [2, D], or
    [1, D] without a bias.
    """
    rows, width = summed.shape
    out = torch.empty_like(summed)
    programs = min(rows, PROGRAMS)
    parts = summed.new_empty(1 + centred, programs, width, dtype=torch.float32)
    launch = add_norm_backward_kernel[(programs,)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(
        summed,
        given,
        summed if passed is None else passed,
        weight,
        out,
        parts[0],
        parts[-1],
        rows,
        width,
        eps,
        passes=passed is not None,
        centred=centred,
        block=block,
        num_warps=warps_of(block),
    )
    return out, parts.sum(1)
