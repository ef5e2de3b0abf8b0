"""Triton kernels. Each has a plain twin that the tests compare it with, and a gain in
benchmarks/LOG.md; imported only where Triton is installed and tensors are on CUDA.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 1024  # columns a program works on: 2 KiB of bf16, read and written in whole lines


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
