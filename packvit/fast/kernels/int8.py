"""int8: rounding to it, and the matmul whose tokens have a scale for each tile of 128 columns."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # pyright: ignore[reportMissingImports]
    TensorDescriptor,
)

TILE = 128  # columns of a scale, and the depth of a step along the sum
ROWS, COLUMNS = 128, 128  # of a tile of sums


@triton.jit
def larger(x, y):
    """The larger of two, and NaN where one is: `tl.max` loses it."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def int8_scale(largest):
    """What makes numbers up to `largest` at most 127; NaN where that is not finite.

    int8 has no NaN, so a row that has one gets it back from its scale.
    """
    return tl.where(largest < float("inf"), tl.maximum(largest, 1e-12) / 127.0, float("nan"))


@triton.jit
def to_int8(x):
    """Round numbers up to 127, ties to even: what is added leaves integers in the low bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # 1.5 * 2**23


@triton.jit
def add_tile_(
    sums,
    stream,
    bias,
    factor,
    weight_scale,
    row,
    column,
    width,
    biased: tl.constexpr,
    factored: tl.constexpr,
    columns: tl.constexpr,
):
    """stream += factor * (sums * weight_scale + bias), for one tile."""
    at = column + tl.arange(0, columns)
    sums *= tl.load(weight_scale + at, mask=at < width, other=0.0)[None]
    if biased:
        sums += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None]
    if factored:
        sums *= tl.load(factor + at, mask=at < width, other=0.0).to(tl.float32)[None]
    sums += stream.load([row, column]).to(tl.float32)
    stream.store([row, column], sums.to(stream.dtype))


@triton.jit
def tiles_kernel(
    tokens,
    weight,
    bias,
    factor,
    stream,
    scales,
    weight_scale,
    rows,
    width,
    depth: tl.constexpr,
    biased: tl.constexpr,
    factored: tl.constexpr,
    tile_rows: tl.constexpr,
    half: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
):
    """Tiles of stream += factor * (tokens @ weight.T + bias), `width` wide.

    A step's sums are exact, and scaled as they are added up in fp32. Each step is two products,
    half the columns each: the first one's sums are scaled while the second one runs. Two programs
    share an SM, so that one computes where the other waits for its product.
    """
    tall, wide = tl.cdiv(rows, tile_rows), tl.cdiv(width, 2 * half)
    for tile in tl.range(tl.program_id(0), tall * wide, tl.num_programs(0)):
        first = tile // (group * wide) * group
        high = tl.minimum(tall - first, group)
        within = tile % (group * wide)
        row = (first + within % high) * tile_rows
        column = within // high * 2 * half
        line = row + tl.arange(0, tile_rows)
        left = tl.zeros((tile_rows, half), tl.float32)
        right = tl.zeros((tile_rows, half), tl.float32)
        at_scale = scales + line
        for place in range(0, depth, tile_depth):
            x = tokens.load([row, place])
            scale = tl.load(at_scale, mask=line < rows, other=0.0)
            at_scale += rows
            w = weight.load([column, place])
            part = tl.dot(x, w.T, out_dtype=tl.int32)
            w = weight.load([column + half, place])
            other = tl.dot(x, w.T, out_dtype=tl.int32)
            left += part.to(tl.float32) * scale[:, None]
            right += other.to(tl.float32) * scale[:, None]
        given = (stream, bias, factor, weight_scale, row)
        add_tile_(left, *given, column, width, biased, factored, half)
        add_tile_(right, *given, column + half, width, biased, factored, half)


def add_tiles_(
    stream: Tensor,
    tokens: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """Return stream + factor * (tokens @ weight.T + bias), written where `stream` is.

    Rounded once, from fp32 sums; tokens and weight are int8 times their scales.

    Shapes: stream [T, D] bfloat16, tokens [T, M], scales [M / 128 rounded up, T], weight [D, M],
    weight_scale, bias, factor [D], contiguous, D and M divisible by 16 -> [T, D].
    """
    rows, depth = tokens.shape
    width = len(weight)
    describe = TensorDescriptor.from_tensor
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(width, COLUMNS)
    count = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    launch = tiles_kernel[(min(tiles, 2 * count),)]  # pyright: ignore[reportIndexIssue]
    launch(
        describe(tokens, [ROWS, TILE]),
        describe(weight, [COLUMNS // 2, TILE]),
        weight if bias is None else bias,
        weight if factor is None else factor,
        describe(stream, [ROWS, COLUMNS // 2]),
        scales,
        weight_scale,
        rows,
        width,
        depth,
        biased=bias is not None,
        factored=factor is not None,
        tile_rows=ROWS,
        half=COLUMNS // 2,
        tile_depth=TILE,
        group=8,
        num_warps=8,
        num_stages=3,
        maxnreg=128,  # half an SM's, for 256 threads
    )
    return stream
