"""The first matmul of an MLP with its activation in the epilogue, in 16 bits and in 8.

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
    output_scale,
    channels,
    rows,
    width,
    depth: tl.constexpr,
    kind: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    fp8: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
):
    """Tiles of act(sums), or of act(gate) * up in turns; sums are tokens @ weight.T, `width` wide.

    A group of `group` rows of tiles shares what it reads of the weight, in L2. Where `fp8`, sums
    are scaled, and results divided by `output_scale` of their row and `channels` of their column.
    """
    tall, wide = tl.cdiv(rows, tile_rows), tl.cdiv(width, tile_columns)
    out_columns: tl.constexpr = tile_columns // (1 + gated)
    for tile in tl.range(tl.program_id(0), tall * wide, tl.num_programs(0), flatten=True):
        first = tile // (group * wide) * group
        high = tl.minimum(tall - first, group)
        within = tile % (group * wide)
        row = (first + within % high) * tile_rows
        column = within // high * tile_columns
        sums = tl.zeros((tile_rows, tile_columns), tl.float32)
        for place in range(0, depth, tile_depth):
            x = tokens.load([row, place])
            w = weight.load([column, place])
            sums = tl.dot(x, w.T, sums)
        at = column + tl.arange(0, tile_columns)
        line = row + tl.arange(0, tile_rows)
        if fp8:
            sums *= tl.load(weight_scale + at, mask=at < width, other=0.0)[None]
            sums *= tl.load(scale + line, mask=line < rows, other=0.0)[:, None]
        if biased:
            sums += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None]
        if gated:
            gate, up = tl.split(tl.reshape(sums, (tile_rows, out_columns, 2)))
            result = activate(gate, kind, out.dtype == tl.float16) * up
            column = column // 2
        else:
            result = activate(sums, kind, out.dtype == tl.float16)
        if fp8:
            at = column + tl.arange(0, out_columns)
            of_column = tl.load(channels + at, mask=at < width // (1 + gated), other=1.0)
            of_row = tl.load(output_scale + line, mask=line < rows, other=1.0)
            result = result * (1.0 / of_column)[None] * (1.0 / of_row)[:, None]
        out.store([row, column], result.to(out.dtype))


def launch_linear_act(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    scales: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Launch the kernel, in 8 bits where there are `scales`: of tokens, weight, output, channels.

    Source: Triton's tutorial of a persistent matmul, for the order of tiles.
    """
    rows, depth = tokens.shape
    width = len(weight)
    wide = -(-width // (1 + gated) // WORDS) * WORDS
    out = tokens.new_empty(rows, wide)  # a matrix whose columns are in words, zeros behind the last
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
        *(scales or (weight,) * 4),
        rows,
        width,
        depth,
        kind=KINDS[activation],
        gated=gated,
        biased=bias is not None,
        fp8=scales is not None,
        tile_rows=ROWS,
        tile_columns=COLUMNS,
        tile_depth=tile_depth,
        group=8,
        num_warps=8,
        num_stages=4 if gated or scales else 3,  # wider results take the room of a stage
    )
    return out


def linear_act(tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return act(tokens @ weight.T + bias), rounded once.

    Shapes: tokens [T, D], weight [M, D], bias [M], contiguous, D and M divisible by 8 -> [T, M].
    """
    return launch_linear_act(tokens, weight, bias, activation, False, None)


def swiglu(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(gate) * up, where gate and up are tokens @ weight.T + bias, in turns.

    Behind them are zeros up to a multiple of 8, which the matrix that reads them wants.

    Shapes: tokens [T, D], weight [2 M, D], bias [2 M], contiguous, D divisible by 8 -> [T, M'].
    """
    return launch_linear_act(tokens, weight, bias, "silu", True, None)


def linear_act_fp8(
    tokens: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output_scale: Tensor,
    channels: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Return act(u), or act(g) * u of the two in turns, over output_scale * channels, in 8 bits.

    u and g are (tokens * scale) @ (weight * weight_scale).T + bias. What is divided must not be
    larger than 448, for which see `fp8.OutputBound`; what is larger becomes 448, NaN stays NaN.

    Shapes: tokens float8_e4m3fn [T, D], scale [T, 1], weight float8_e4m3fn [M, D], or [2 M, D]
    where gated, weight_scale [1, M or 2 M], output_scale [T, 1], channels [M], contiguous, D and M
    divisible by 16 -> float8_e4m3fn [T, M].
    """
    scales = (scale, weight_scale, output_scale, channels)
    return launch_linear_act(tokens, weight, bias, activation, gated, scales)
