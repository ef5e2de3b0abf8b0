"""SwiGLU by itself, with a derivative; in the epilogue of its matmul it is in `matmuls.py`.

Gate and up projection alternate, column by column, so that whoever has one has the other.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 1024  # columns a program works on: 2 KiB of bf16, in whole lines


@triton.jit
def silu_mul_kernel(gate_up, out, width, block: tl.constexpr):
    """One row's `block` columns: out = gate * sigmoid(gate) * up, in fp32 within."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * block
    pair, column = 2 * first + tl.arange(0, 2 * block), first + tl.arange(0, block)
    both = tl.load(gate_up + row * 2 * width + pair, mask=pair < 2 * width).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (block, 2)))
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=column < width)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for gate and up in turns, in one pass over memory.

    Shapes: [T, 2 M], contiguous -> [T, M].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, BLOCK))
    launch = silu_mul_kernel[grid]  # pyright: ignore[reportIndexIssue] # how Triton launches
    launch(gate_up, out, width, block=BLOCK)
    return out


@triton.jit
def silu_mul_backward_kernel(gate_up, given, out, width, block: tl.constexpr):
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


def silu_mul_backward(gate_up: Tensor, given: Tensor) -> Tensor:
    """Return the gradient of what `silu_mul` was given. Shapes: [T, 2 M], [T, M] -> [T, 2 M]."""
    rows, width = given.shape
    out = torch.empty_like(gate_up)
    grid = (rows, triton.cdiv(width, BLOCK))
    launch = silu_mul_backward_kernel[grid]  # pyright: ignore[reportIndexIssue]
    launch(gate_up, given, out, width, block=BLOCK)
    return out
