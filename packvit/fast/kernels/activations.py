"""Activations, and their derivative together with the gradient of a bias before them."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}
CHUNK, ROWS, COLUMNS = 256, 16, 128  # rows of a program, and its tiles


@triton.jit
def half_erfc(x):
    """erfc(x / sqrt(2)) / 2 for x >= 0, within 1e-7: one exponential and a polynomial.

    libdevice's erf takes as long as the pass over memory that an epilogue spares.
    Source: Abramowitz and Stegun, formula 7.1.26.
    """
    t = 1.0 / (1.0 + 0.23164189 * x)  # 0.3275911 / sqrt(2)
    poly = 0.5307027145 * t - 0.7265760135
    poly = 0.7107068705 + t * poly
    poly = 0.127414796 + t * (-0.142248368 + t * poly)
    poly *= t
    return poly * tl.exp(-0.5 * x * x)


@triton.jit
def tanh(x):
    """tanh within 2**-11 of itself, by the one instruction that the GPU has for it."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def activate(x, kind: tl.constexpr, close: tl.constexpr):
    """The activations of `model.activations.ACTIVATIONS`; `close` for results finer than bfloat16.

    All are x times a sigmoid, which is (1 + tanh) / 2, and GELU is within 3e-5 by a polynomial in
    place of x. Of what rounding to bfloat16 loses this changes less than one part in 1,000, and a
    matmul's epilogue takes a fifth of the time of an exponential and a quotient
    (benchmarks/LOG.md).
    """
    if close:
        if kind == 0:
            return x * tl.sigmoid(x)
        elif kind == 1:
            tail = half_erfc(tl.abs(x))
            return x * tl.where(x < 0, tail, 1.0 - tail)
        elif kind == 2:
            return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        else:
            return x * tl.sigmoid(1.702 * x)
    half = 0.5 * x
    if kind == 0:
        inner = half
    elif kind == 1:
        square = tl.minimum(x * x, 30.0)  # from where on tanh is 1, and the polynomial falls
        inner = x * (0.797502553 + square * (0.0370104273 - 0.000352286167 * square))
    elif kind == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    else:
        inner = 0.851 * x
    return half * tanh(inner) + half


@triton.jit
def derive(x, kind: tl.constexpr):
    """The derivatives of `activate`."""
    if kind == 1:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
            -0.5 * x * x
        )
    elif kind == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        sigmoid = tl.sigmoid(2.0 * inner)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
    else:
        rate: tl.constexpr = 1.0 if kind == 0 else 1.702
        sigmoid = tl.sigmoid(rate * x)
        return sigmoid + rate * x * sigmoid * (1.0 - sigmoid)


@triton.jit
def activate_backward_kernel(
    hidden,
    given,
    out,
    parts,
    rows,
    width,
    kind: tl.constexpr,
    chunk: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """`chunk` rows of `tile_columns` columns: out = given * act'(hidden), and its sum over rows."""
    column = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)
    sums = tl.zeros((tile_columns,), tl.float32)
    for first in range(0, chunk, tile_rows):
        row = tl.program_id(1) * chunk + first + tl.arange(0, tile_rows)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(given + at, mask=inside, other=0.0).to(tl.float32)
        result = (dy * derive(x, kind)).to(out.dtype.element_ty)
        tl.store(out + at, result, mask=inside)
        sums += tl.sum(result.to(tl.float32), 0)
    tl.store(parts + tl.program_id(1).to(tl.int64) * width + column, sums, mask=column < width)


def activate_backward(hidden: Tensor, given: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return given * act'(hidden), and its sum over rows, in one pass.

    Sums are taken in fp32, in an order that is always the same.

    Shapes: hidden, given [T, M], contiguous -> [T, M], [M] float32.
    """
    rows, width = hidden.shape
    out, chunks = torch.empty_like(hidden), triton.cdiv(rows, CHUNK)
    parts = hidden.new_empty(chunks, width, dtype=torch.float32)
    grid = (triton.cdiv(width, COLUMNS), chunks)
    launch = activate_backward_kernel[grid]  # pyright: ignore[reportIndexIssue]
    kind = KINDS[activation]
    launch(hidden, given, out, parts, rows, width, kind, CHUNK, ROWS, COLUMNS)
    return out, parts.sum(0)
