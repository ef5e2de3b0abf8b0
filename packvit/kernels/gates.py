"""SwiGLU: in the epilogue of its matmul for inference, and by itself, with a derivative.

Gate and up projection alternate, column by column, so that whoever has one has the other: within a
matmul's accumulator both are in one thread's registers.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # pyright: ignore[reportMissingImports]
    TensorDescriptor,
)

from packvit.kernels import operator

BLOCK = 1024  # columns a program works on: 2 KiB of bf16, in whole lines
ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile: 128 x 256 x 64 of the matmul


@triton.jit
def silu_times_kernel(gate_up, out, width, block: tl.constexpr):
    """One row's `block` columns: out = gate * sigmoid(gate) * up, in fp32 within."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * block
    pair, column = 2 * first + tl.arange(0, 2 * block), first + tl.arange(0, block)
    both = tl.load(gate_up + row * 2 * width + pair, mask=pair < 2 * width).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (block, 2)))
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=column < width)


def like_silu_times(gate_up: Tensor) -> Tensor:
    """Return what `silu_times` does, but for its numbers."""
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@operator(like_silu_times)
def silu_times(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for gate and up in turns, in one pass over memory.

    Shapes: [T, 2 M], contiguous -> [T, M].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, BLOCK))
    launch = silu_times_kernel[grid]  # pyright: ignore[reportIndexIssue] # how Triton launches
    launch(gate_up, out, width, block=BLOCK)
    return out


@triton.jit
def silu_times_backward_kernel(gate_up, given, out, width, block: tl.constexpr):
    """One row's `block` columns of the derivative, gate's and up's in turns."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * block
    pair, column = 2 * first + tl.arange(0, 2 * block), first + tl.arange(0, block)
    at = row * 2 * width + pair
    both = tl.load(gate_up + at, mask=pair < 2 * width).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (block, 2)))
    dy = tl.load(given + row * width + column, mask=column < width).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    result = tl.reshape(tl.join(d_gate, dy * gate * sigmoid), (2 * block,))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=pair < 2 * width)


def like_silu_times_backward(gate_up: Tensor, given: Tensor) -> Tensor:
    """Return what `silu_times_backward` does, but for its numbers."""
    return torch.empty_like(gate_up)


@operator(like_silu_times_backward)
def silu_times_backward(gate_up: Tensor, given: Tensor) -> Tensor:
    """Return the gradient of what `silu_times` was given. Shapes: [T, 2 M], [T, M] -> [T, 2 M]."""
    rows, width = given.shape
    out = torch.empty_like(gate_up)
    grid = (rows, triton.cdiv(width, BLOCK))
    launch = silu_times_backward_kernel[grid]  # pyright: ignore[reportIndexIssue]
    launch(gate_up, given, out, width, block=BLOCK)
    return out


@triton.jit
def swiglu_kernel(
    tokens,
    weight,
    bias,
    out,
    rows,
    width,
    depth: tl.constexpr,
    biased: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
):
    """Tiles of out = silu(gate) * up in turn; gate and up are tokens @ weight.T, in turns.

    A group of `group` rows of tiles shares what it reads of the weight, in L2.
    """
    tall, wide = tl.cdiv(rows, tile_rows), tl.cdiv(width, tile_columns)
    for tile in tl.range(tl.program_id(0), tall * wide, tl.num_programs(0), flatten=True):
        first = tile // (group * wide) * group
        high = tl.minimum(tall - first, group)
        within = tile % (group * wide)
        row = (first + within % high) * tile_rows
        column = within // high * tile_columns
        sums = tl.zeros((tile_rows, 2 * tile_columns), tl.float32)
        for place in range(0, depth, tile_depth):
            x = tokens.load([row, place])
            w = weight.load([2 * column, place])
            sums = tl.dot(x, w.T, sums)
        if biased:
            pair = 2 * column + tl.arange(0, 2 * tile_columns)
            sums += tl.load(bias + pair, mask=pair < 2 * width, other=0.0).to(tl.float32)[None]
        gate, up = tl.split(tl.reshape(sums, (tile_rows, tile_columns, 2)))
        result = gate * tl.sigmoid(gate) * up
        out.store([row, column], result.to(out.dtype))


def like_swiglu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what `swiglu` does, but for its numbers."""
    return tokens.new_empty(len(tokens), len(weight) // 2)


@operator(like_swiglu)
def swiglu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(gate) * up, where gate and up are tokens @ weight.T + bias, in turns.

    Neither is ever written to memory. A row's sums do not know how many other rows there are.

    Shapes: tokens [T, D], weight [2 M, D], bias [2 M], contiguous, D and M divisible by 8 ->
    [T, M].
    Source: Triton's tutorial of a persistent matmul, for the order of tiles.
    """
    rows, depth = tokens.shape
    width = len(weight) // 2
    out = tokens.new_empty(rows, width)
    describe = TensorDescriptor.from_tensor
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(width, COLUMNS)
    count = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    launch = swiglu_kernel[(min(tiles, count),)]  # pyright: ignore[reportIndexIssue]
    launch(
        describe(tokens, [ROWS, DEPTH]),
        describe(weight, [2 * COLUMNS, DEPTH]),
        weight if bias is None else bias,
        describe(out, [ROWS, COLUMNS]),
        rows,
        width,
        depth,
        biased=bias is not None,
        tile_rows=ROWS,
        tile_columns=COLUMNS,
        tile_depth=DEPTH,
        group=8,
        num_warps=8,
        num_stages=4,
    )
    return out
