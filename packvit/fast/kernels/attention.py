"""What queries, keys and values need before attention takes them: rotary angles, finite values."""

import torch
import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

HEADS = 16  # that a program of `widen` works on
TOKENS, LOOK = 64, 8  # of a program of `zero_nonfinite_`; the values it first reads of each


@triton.jit
def zero_nonfinite_kernel(
    values,
    keys,
    rows,
    stride,
    key_stride,
    width,
    some: tl.constexpr,
    look: tl.constexpr,
    block: tl.constexpr,
):
    """`some` tokens: zero wherever a value is not finite, and NaN in the key at its place.

    Those are left alone whose first `look` values are finite.
    """
    first = tl.program_id(0) * some
    row = (first + tl.arange(0, some)).to(tl.int64)
    head = values + row[:, None] * stride + tl.arange(0, look)[None]
    seen = tl.load(head, mask=(row < rows)[:, None] & (tl.arange(0, look) < width)[None], other=0.0)
    if tl.max(tl.where(tl.abs(seen.to(tl.float32)) < float("inf"), 0, 1)) > 0:  # NaN is not below
        column = tl.arange(0, block)
        for number in range(first, tl.minimum(first + some, rows)):
            place = tl.cast(number, tl.int64)
            at = values + place * stride + column
            x = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
            bad = (column < width) & ((tl.abs(x) < float("inf")) == 0)
            kind = values.dtype.element_ty
            tl.store(at, tl.zeros((block,), kind), mask=bad)
            nan = tl.full((block,), float("nan"), tl.float32).to(kind)
            tl.store(keys + place * key_stride + column, nan, mask=bad)


def zero_nonfinite_(values: Tensor, keys: Tensor) -> None:
    """Make values that are not finite zero, where they are, and the keys in their places NaN.

    So a token that is not finite makes its own sequence NaN, and no other. Values come of one
    matrix, which leaves none of them finite if it reads anything that is not. So in bfloat16 a look
    at a token's first values tells, a sum that overflows by itself being beyond what weights and
    tokens of any use come to; in float16 it is not, and all are looked at.

    Shapes: [T, H, K], a token's heads side by side.
    """
    rows, heads, depth = values.shape
    assert values.stride()[1:] == keys.stride()[1:] == (depth, 1)
    width = heads * depth
    block = triton.next_power_of_2(width)
    some, look = (1, block) if values.dtype == torch.float16 else (TOKENS, LOOK)
    launch = zero_nonfinite_kernel[(triton.cdiv(rows, some),)]  # pyright: ignore[reportIndexIssue]
    launch(
        values,
        keys,
        rows,
        values.stride(0),
        keys.stride(0),
        width,
        some=some,
        look=look,
        block=block,
    )


@triton.jit
def widen_kernel(
    given,
    out,
    stride,
    heads: tl.constexpr,
    depth: tl.constexpr,
    wide: tl.constexpr,
    some: tl.constexpr,
    block: tl.constexpr,
):
    """`some` heads of a token: their `depth` numbers, and zeros up to `wide`, or the first `wide`.

    Sizes are constants, from which the compiler sees that whole words can be moved.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * some + tl.arange(0, some)[:, None]
    place = tl.arange(0, block)[None, :]
    there = (head < heads) & (place < depth)
    x = tl.load(given + row * stride + head * depth + place, mask=there, other=0.0)
    inside = (head < heads) & (place < wide)
    tl.store(out + row * heads * wide + head * wide + place, x, mask=inside)


def widen(given: Tensor, wide: int) -> Tensor:
    """Return heads of `wide` numbers, with zeros behind theirs, or with theirs cut off.

    Half of what F.pad takes, which writes everything twice.

    Shapes: [T, ..., K], contiguous but for the first dimension -> [T, ..., wide].
    """
    rows, depth = len(given), given.shape[-1]
    heads = given[0].numel() // depth
    assert given[0].is_contiguous()
    out = given.new_empty(*given.shape[:-1], wide)
    grid = (rows, triton.cdiv(heads, HEADS))
    launch = widen_kernel[grid]  # pyright: ignore[reportIndexIssue]
    block = triton.next_power_of_2(max(wide, depth))
    launch(given, out, given.stride(0), heads, depth, wide, HEADS, block)
    return out


@triton.jit
def rotate_kernel(
    heads,
    cosine,
    sine,
    stride,
    cosine_stride,
    count: tl.constexpr,
    half: tl.constexpr,
    sign: tl.constexpr,
    block: tl.constexpr,
    some: tl.constexpr,
):
    """Heads of one token: (a, b) becomes (a cos - b sin, b cos + a sin), in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    angle, there = row * cosine_stride + at, at < half
    cos_a = tl.load(cosine + angle, mask=there).to(tl.float32)[None]
    cos_b = tl.load(cosine + angle + half, mask=there).to(tl.float32)[None]
    sin_a = tl.load(sine + angle, mask=there).to(tl.float32)[None] * sign
    sin_b = tl.load(sine + angle + half, mask=there).to(tl.float32)[None] * sign
    for first in range(0, count, some):
        head = first + tl.arange(0, some)[:, None]
        place = heads + row * stride + head * (2 * half) + at[None]
        inside = (head < count) & there[None]
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        kind = heads.dtype.element_ty
        tl.store(place, (a * cos_a - b * sin_a).to(kind), mask=inside)
        tl.store(place + half, (b * cos_b + a * sin_b).to(kind), mask=inside)


def rotate_(heads: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> None:
    """Turn heads by their token's rotary angles, in place; `back` by the angles' negatives.

    A quarter of the passes that `model.rotary.rotate` makes over memory, which is its reference
    implementation. `back` is the derivative's transpose, of sines whose halves are swapped.

    Shapes: heads [T, H, K], a token's heads side by side; cosine, sine [T, K].
    """
    rows, count, head_dim = heads.shape
    assert heads.stride()[1:] == (head_dim, 1)
    launch = rotate_kernel[(rows,)]  # pyright: ignore[reportIndexIssue]
    launch(
        heads,
        cosine,
        sine,
        heads.stride(0),
        cosine.stride(0),
        count,
        head_dim // 2,
        -1.0 if back else 1.0,
        triton.next_power_of_2(head_dim // 2),
        16,
    )
