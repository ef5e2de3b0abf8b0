"""Matmuls with what follows in the epilogue: an MLP's first one in 16 bits, and those in int8.

Gate and up projection alternate, column by column: both are in one thread's registers then, and
neither is ever written to memory. A row's sums do not know how many other rows there are.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # pyright: ignore[reportMissingImports]
    TensorDescriptor,
)

from packvit.fast.kernels.activations import KINDS, activate
from packvit.fast.kernels.int8 import TILE, int8_scale, larger, to_int8
from packvit.model.linear import WORDS

ROWS, COLUMNS = 128, 256  # of a tile of sums
DEPTH = 128  # bytes of a row that a step along the sum reads


@triton.jit
def linear_act_kernel(
    tokens,
    weight,
    bias,
    out,
    scale,
    weight_scale,
    apart,
    apart_weight,
    out_scale,
    rows,
    width,
    depth: tl.constexpr,
    kind: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    int8: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
    apart_columns: tl.constexpr,
    scaled_columns: tl.constexpr,
):
    """Tiles of act(sums), or of act(gate) * up in turns; sums are tokens @ weight.T, `width` wide.

    A group of `group` rows of tiles shares what it reads of the weight, in L2. Where `int8`, sums
    are scaled, and those of columns `apart`, which are bfloat16, added, if there are any; and where
    `out` is of int8 too, each `scaled_columns` of a row get a scale.
    """
    tall, wide = tl.cdiv(rows, tile_rows), tl.cdiv(width, tile_columns)
    out_columns: tl.constexpr = tile_columns // (1 + gated)
    for tile in tl.range(tl.program_id(0), tall * wide, tl.num_programs(0), flatten=True):
        first = tile // (group * wide) * group
        high = tl.minimum(tall - first, group)
        within = tile % (group * wide)
        row = (first + within % high) * tile_rows
        column = within // high * tile_columns
        sums = tl.zeros((tile_rows, tile_columns), tl.int32 if int8 else tl.float32)
        for place in range(0, depth, tile_depth):
            x = tokens.load([row, place])
            w = weight.load([column, place])
            sums = tl.dot(x, w.T, sums, out_dtype=sums.dtype)
        at = column + tl.arange(0, tile_columns)
        line = row + tl.arange(0, tile_rows)
        result = sums.to(tl.float32)
        if int8:
            result *= tl.load(weight_scale + at, mask=at < width, other=0.0)[None]
            result *= tl.load(scale + line, mask=line < rows, other=0.0)[:, None]
        if apart_columns:
            few = tl.arange(0, apart_columns)[None]
            here = apart + line[:, None] * apart_columns + few
            x = tl.load(here, mask=(line < rows)[:, None], other=0.0)
            here = apart_weight + at[:, None] * apart_columns + few
            w = tl.load(here, mask=(at < width)[:, None], other=0.0)
            result = tl.dot(x, w.T, result)
        if biased:
            result += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None]
        if gated:
            gate, up = tl.split(tl.reshape(result, (tile_rows, out_columns, 2)))
            result = activate(gate, kind, out.dtype == tl.float16) * up
            column = column // 2
        elif kind >= 0:
            result = activate(result, kind, out.dtype == tl.float16)
        if out.dtype == tl.int8:
            parts: tl.constexpr = out_columns // scaled_columns
            cut = tl.reshape(result, (tile_rows, parts, scaled_columns))
            of_part = int8_scale(tl.reduce(tl.abs(cut), 2, larger))
            part = column // scaled_columns + tl.arange(0, parts)
            here = out_scale + part.to(tl.int64)[None] * rows + line[:, None]
            inside = part * scaled_columns < width // (1 + gated)
            tl.store(here, of_part, mask=(line < rows)[:, None] & inside[None])
            cut = cut * (1.0 / of_part)[:, :, None]
            result = to_int8(tl.reshape(cut, (tile_rows, out_columns)))
        out.store([row, column], result.to(out.dtype))


def launch_linear_act(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    out: Tensor,
    int8: tuple[Tensor, ...] | None = None,
) -> None:
    """Launch the kernel, in int8 where that is given.

    `int8` are the scales of tokens and weight, what of both is apart, and the scales of `out`.

    Source: Triton's tutorial of a persistent matmul, for the order of tiles.
    """
    rows, depth = tokens.shape
    width = len(weight)
    tile_depth = DEPTH // tokens.element_size()
    describe = TensorDescriptor.from_tensor
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(width, COLUMNS)
    count = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    launch = linear_act_kernel[(min(tiles, count),)]  # pyright: ignore[reportIndexIssue]
    launch(
        describe(tokens, [ROWS, tile_depth]),
        describe(weight, [COLUMNS, tile_depth]),
        weight if bias is None else bias,
        describe(out, [ROWS, COLUMNS // (1 + gated)]),
        *(int8 or (weight,) * 5),
        rows,
        width,
        depth,
        kind=-1 if activation is None else KINDS[activation],
        gated=gated,
        biased=bias is not None,
        int8=int8 is not None,
        tile_rows=ROWS,
        tile_columns=COLUMNS,
        tile_depth=tile_depth,
        group=8,
        apart_columns=int8[2].shape[1] if int8 else 0,
        scaled_columns=TILE,
        num_warps=8,
        num_stages=4 if gated else 3,  # wider results take the room of a stage
    )


def new_words(tokens: Tensor, width: int) -> Tensor:
    """Return room for rows so wide, and for zeros behind them up to whole words."""
    return tokens.new_empty(len(tokens), -(-width // WORDS) * WORDS)


def linear_act(tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return act(tokens @ weight.T + bias), rounded once.

    Shapes: tokens [T, D], weight [M, D], bias [M], contiguous, D and M divisible by 8 -> [T, M].
    """
    out = new_words(tokens, len(weight))
    launch_linear_act(tokens, weight, bias, activation, False, out)
    return out


def swiglu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(gate) * up, where gate and up are tokens @ weight.T + bias, in turns.

    Behind them are zeros up to a multiple of 8, which the matrix that reads them wants.

    Shapes: tokens [T, D], weight [2 M, D], bias [2 M], contiguous, D divisible by 8 -> [T, M'].
    """
    out = new_words(tokens, len(weight) // 2)
    launch_linear_act(tokens, weight, bias, "silu", True, out)
    return out


def linear_int8(
    tokens: Tensor,
    scale: Tensor,
    apart: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    apart_weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return tokens @ weight.T + apart @ apart_weight.T + bias, rounded once, in bfloat16.

    tokens and weight are int8 times their scales, the columns apart bfloat16.

    Shapes: tokens [T, D], scale [T, 1], apart [T, 16 or 0], weight [M, D], weight_scale, bias [M],
    apart_weight [M, 16 or 0], contiguous, D and M divisible by 16 -> [T, M].
    """
    out = apart.new_empty(len(tokens), len(weight))
    int8 = (scale, weight_scale, apart, apart_weight, scale)
    launch_linear_act(tokens, weight, bias, None, False, out, int8)
    return out


def linear_act_int8(
    tokens: Tensor,
    scale: Tensor,
    apart: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    apart_weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Return act(u), or act(g) * u of the two in turns, in int8, and scales for each 128 columns.

    u and g are what `linear_int8` gives, unrounded. NaN and Inf make the scale NaN.

    Shapes: as `linear_int8`, weight [2 M, D] where gated -> [T, M], [M / 128 rounded up, T].
    """
    rows, width = len(tokens), len(weight) // (1 + gated)
    out = tokens.new_empty(rows, width)
    out_scale = scale.new_empty(triton.cdiv(width, TILE), rows)
    int8 = (scale, weight_scale, apart, apart_weight, out_scale)
    launch_linear_act(tokens, weight, bias, activation, gated, out, int8)
    return out, out_scale
