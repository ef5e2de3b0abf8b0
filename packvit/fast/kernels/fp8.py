"""To 8 bits: the scale of a row and of what is made of it, activations and plain tokens."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from packvit.fast.kernels import warps_of
from packvit.fast.kernels.activations import KINDS, activate


@triton.jit
def store_fp8(values, scales, row, column, inside, width, result):
    """Scale a row so that its largest magnitude is 448, the largest of float8_e4m3fn.

    A NaN in the row must reach the scale, which `tl.max` alone would not let it.
    """
    largest = tl.max(tl.where(inside, tl.abs(result), 0.0), 0)
    bad = tl.sum(tl.where(inside & (result != result), 1, 0), 0) > 0
    scale = tl.where(bad, float("nan"), tl.maximum(largest, 1e-12) / 448.0)
    tl.store(scales + row, scale)
    fp8 = (result * (1.0 / scale)).to(values.dtype.element_ty)
    tl.store(values + row * width + column, fp8, mask=inside)


@triton.jit
def store_output_scale(output_scale, row, column, inside, width, bound, squared, result):
    """Store the scale of what a row becomes: `fp8.OutputBound.scales`. A NaN must come through."""
    weights = tl.load(bound + column, mask=inside, other=0.0)
    more = tl.load(bound + width)
    made = tl.sum(result * result * weights * weights, 0) + more * more
    if not squared:
        made = tl.sqrt(made)
    made = tl.maximum(made, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    tl.store(output_scale + row, made)


@triton.jit
def activate_fp8_kernel(
    hidden,
    channels,
    values,
    scales,
    width,
    kind: tl.constexpr,
    gated: tl.constexpr,
    divides: tl.constexpr,
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
        result = activate(gate, kind, True) * up
    else:
        at = row * width + column
        result = activate(tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32), kind, True)
    if divides:
        result /= tl.load(channels + column, mask=inside, other=1.0)
    store_fp8(values, scales, row, column, inside, width, result)


def activate_fp8(
    hidden: Tensor, activation: str, gated: bool, channels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return act(hidden), or act(gate) * up of the two in turns, over `channels`, in 8 bits.

    Shapes: [T, M], or [T, 2 M] where gated, contiguous -> [T, M] float8_e4m3fn, its scale [T, 1].
    """
    width = hidden.shape[1] // 2 if gated else hidden.shape[1]
    values = hidden.new_empty(len(hidden), width, dtype=torch.float8_e4m3fn)
    scales = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
    launch = activate_fp8_kernel[(len(hidden),)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(
        hidden,
        hidden if channels is None else channels,
        values,
        scales,
        width,
        kind=KINDS[activation],
        gated=gated,
        divides=channels is not None,
        block=block,
        num_warps=warps_of(block),
    )
    return values, scales


@triton.jit
def quantize_kernel(
    tokens,
    bound,
    values,
    scales,
    output_scale,
    width,
    bounded: tl.constexpr,
    squared: tl.constexpr,
    block: tl.constexpr,
):
    """One row to 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    result = tl.load(tokens + row * width + column, mask=inside, other=0.0).to(tl.float32)
    store_fp8(values, scales, row, column, inside, width, result)
    if bounded:
        store_output_scale(output_scale, row, column, inside, width, bound, squared, result)


def new_scales(tokens: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return room for the scales of rows, and for those of what rows become if asked for."""
    scales = tokens.new_empty(tokens.shape[0], 1, dtype=torch.float32)
    # By itself: cuBLAS refuses scales that begin where a word of 16 bytes does not.
    return scales, scales.new_empty(scales.shape[0] if bound is not None else 0, 1)


def quantize_fp8(
    tokens: Tensor, bound: Tensor | None, squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens in 8 bits, their scale, and that of what they become: `fp8.OutputBound`.

    Shapes: tokens [T, D], contiguous, bound [D + 1] -> [T, D], [T, 1], [T, 1] or [0, 1] without.
    """
    width = tokens.shape[1]
    values = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    scales, output_scale = new_scales(tokens, bound)
    launch = quantize_kernel[(len(tokens),)]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(width)
    launch(
        tokens,
        tokens if bound is None else bound,
        values,
        scales,
        output_scale,
        width,
        bounded=bound is not None,
        squared=squared,
        block=block,
        num_warps=warps_of(block),
    )
    return values, scales, output_scale
