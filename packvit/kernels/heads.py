"""What attention's heads need before a kernel of others takes them."""

import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

HEADS = 16  # that a program of `widen` works on


@triton.jit
def tame_kernel(values, stride, width, block: tl.constexpr):
    """One token: the largest of float16 wherever a value is not finite."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    at = values + row * stride + column
    inside = column < width
    x = tl.load(at, mask=inside, other=0.0)
    finite = tl.abs(x.to(tl.float32)) < float("inf")  # NaN is not
    tl.store(at, tl.full((block,), 65504.0, values.dtype.element_ty), mask=inside & (finite == 0))


def tame(values: Tensor) -> None:
    """Make finite, where they are, an attention's values that are not.

    Where a token is NaN its keys are too, so that its own sequence still comes out as NaN. Read
    once, and written only where it has to be: a copy would cost 2.5 times as much.

    Shapes: [T, H, K], a token's heads side by side.
    """
    rows, heads, depth = values.shape
    assert values.stride()[1:] == (depth, 1)
    launch = tame_kernel[(rows,)]  # pyright: ignore[reportIndexIssue]
    width = heads * depth
    launch(values, values.stride(0), width, block=triton.next_power_of_2(width))


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
