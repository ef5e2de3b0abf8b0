"""Triton kernels. Each has a plain twin in `steps.py` that the tests compare it with, and a gain in
benchmarks/LOG.md; imported only where Triton is installed and tensors are on CUDA.

Every program works on one token, or a part of one, so no token's bits depend on another.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 1024  # columns a program of `silu_times` works on: 2 KiB of bf16, in whole lines
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}


@triton.jit
def silu_times_kernel(gate_up, out, width, block: tl.constexpr):
    """One row's `block` columns: out = gate * sigmoid(gate) * up, in fp32 within."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("packvit::silu_times", mutates_args=())
def silu_times(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for gate and up side by side, in one pass over memory.

    Shapes: [T, 2 M], contiguous -> [T, M].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, BLOCK))
    launch = silu_times_kernel[grid]  # pyright: ignore[reportIndexIssue] # how Triton launches
    launch(gate_up, out, width, block=BLOCK)
    return out


@silu_times.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@triton.jit
def store_8(values, scales, row, column, inside, width, result):
    """Scale a row so that its largest magnitude is 448, the largest of float8_e4m3fn.

    A NaN in the row must reach the scale, which `tl.max` alone would not let it.
    """
    largest = tl.max(tl.where(inside, tl.abs(result), 0.0), 0)
    bad = tl.sum(tl.where(inside & (result != result), 1, 0), 0) > 0
    scale = tl.where(bad, float("nan"), tl.maximum(largest, 1e-12) / 448.0)
    tl.store(scales + row, scale)
    eight = (result / scale).to(values.dtype.element_ty)
    tl.store(values + row * width + column, eight, mask=inside)


@triton.jit
def add_norm_kernel(
    stream,
    delta,
    weight,
    bias,
    summed,
    out,
    scales,
    width,
    eps,
    adds: tl.constexpr,
    centred: tl.constexpr,
    eight: tl.constexpr,
    block: tl.constexpr,
):
    """One row: summed = stream + delta, out = norm(summed), RMS or (`centred`) layer norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = row * width + column
    x = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        rounded = (x + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(
            summed.dtype.element_ty
        )
        tl.store(summed + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if centred:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    result = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if centred:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if eight:
        store_8(out, scales, row, column, inside, width, result)
    else:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def launch_add_norm(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    scales: Tensor,
) -> Tensor:
    """Launch the kernel, and return the sum, which is empty where nothing is added."""
    rows, width = stream.shape
    summed = torch.empty_like(stream) if delta is not None else stream.new_empty(0)
    block = triton.next_power_of_2(width)
    launch = add_norm_kernel[(rows,)]  # pyright: ignore[reportIndexIssue]
    launch(
        stream,
        stream if delta is None else delta,
        weight,
        weight if bias is None else bias,
        summed,
        out,
        scales,
        width,
        eps,
        adds=delta is not None,
        centred=bias is not None,
        eight=out.dtype == torch.float8_e4m3fn,
        block=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return summed


@torch.library.custom_op("packvit::add_norm", mutates_args=())
def add_norm(
    stream: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return stream + delta, or nothing where there is no delta, and its norm, in one pass.

    A bias makes it a layer norm; without one it is an RMS norm.

    Shapes: stream, delta [T, D], contiguous; weight, bias [D] -> [T, D] or [0], [T, D].
    """
    out = torch.empty_like(stream)
    return launch_add_norm(stream, delta, weight, bias, eps, out, out), out


@add_norm.register_fake
def _(stream, delta, weight, bias, eps):
    summed = torch.empty_like(stream) if delta is not None else stream.new_empty(0)
    return summed, torch.empty_like(stream)


@torch.library.custom_op("packvit::add_norm_8", mutates_args=())
def add_norm_8(
    stream: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_norm`, the norm in 8 bits: [T, D] float8_e4m3fn and its scale [T, 1] float32."""
    values = torch.empty_like(stream, dtype=torch.float8_e4m3fn)
    scales = stream.new_empty(len(stream), 1, dtype=torch.float32)
    return launch_add_norm(stream, delta, weight, bias, eps, values, scales), values, scales


@add_norm_8.register_fake
def _(stream, delta, weight, bias, eps):
    summed = torch.empty_like(stream) if delta is not None else stream.new_empty(0)
    values = torch.empty_like(stream, dtype=torch.float8_e4m3fn)
    return summed, values, stream.new_empty(len(stream), 1, dtype=torch.float32)


@triton.jit
def activate(x, kind: tl.constexpr):
    """The activations of `steps.ACTIVATIONS`; tanh by its sigmoid, which Triton has."""
    if kind == 0:
        return x * tl.sigmoid(x)
    elif kind == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    else:
        return x * tl.sigmoid(1.702 * x)


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
        at = row * 2 * width + column
        up = tl.load(hidden + at + width, mask=inside, other=0.0).to(tl.float32)
        result = activate(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), kind) * up
    else:
        at = row * width + column
        result = activate(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), kind)
    store_8(values, scales, row, column, inside, width, result)


@torch.library.custom_op("packvit::activate_8", mutates_args=())
def activate_8(hidden: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor]:
    """Return act(hidden), or act(gate) * up of the two side by side, in 8 bits.

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


@activate_8.register_fake
def _(hidden, activation, gated):
    width = hidden.shape[1] // 2 if gated else hidden.shape[1]
    scales = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
    return hidden.new_empty(len(hidden), width, dtype=torch.float8_e4m3fn), scales


@triton.jit
def quantise_kernel(tokens, values, scales, width, block: tl.constexpr):
    """One row to 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    result = tl.load(tokens + row * width + column, mask=inside, other=0.0).to(tl.float32)
    store_8(values, scales, row, column, inside, width, result)


@torch.library.custom_op("packvit::quantise_8", mutates_args=())
def quantise_8(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens in 8 bits and their scale. Shapes: [T, D], contiguous -> [T, D], [T, 1]."""
    width = tokens.shape[1]
    values = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    scales = tokens.new_empty(len(tokens), 1, dtype=torch.float32)
    launch = quantise_kernel[(len(tokens),)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(tokens, values, scales, width, block=block, num_warps=4 if block <= 2048 else 8)
    return values, scales


@quantise_8.register_fake
def _(tokens):
    values = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    return values, tokens.new_empty(len(tokens), 1, dtype=torch.float32)


@triton.jit
def tame_kernel(values, out, stride, width, block: tl.constexpr):
    """One token: the largest of float16 wherever a value is not finite."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    x = tl.load(values + row * stride + column, mask=inside, other=0.0)
    finite = tl.abs(x.to(tl.float32)) < float("inf")  # NaN is not
    tl.store(out + row * width + column, tl.where(finite, x, 65504.0), mask=inside)


def tame(values: Tensor) -> Tensor:
    """Return an attention's values with what is not finite made so.

    Where a token is NaN its keys are too, so that its own sequence still comes out as NaN.

    Shapes: [T, H, K], a token's heads side by side -> [T, H, K], contiguous.
    """
    rows, heads, depth = values.shape
    assert values.stride()[1:] == (depth, 1)
    out = values.new_empty(values.shape)
    launch = tame_kernel[(rows,)]  # pyright: ignore[reportIndexIssue]
    width = heads * depth
    launch(values, out, values.stride(0), width, block=triton.next_power_of_2(width))
    return out
