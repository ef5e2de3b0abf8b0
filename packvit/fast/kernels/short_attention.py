"""Attention of short sequences of one length, whose tiles fit them.

FlashAttention-4 works on 128 queries and 128 keys at a time: of 257 tokens it computes 384 x 384.
Here tiles are small, and what is left over at the end of a sequence has tiles of its own size.
"""

import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

QUERIES, KEYS = 64, 64  # of a tile
LEAST = 16  # of a tile, which tensor cores take
LOG2_E = 1.4426950408889634


@triton.jit
def gather(scores, v, found, total, largest, scale):
    """One more tile of keys: what queries find, the sum of their shares, their largest score."""
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    shares = tl.exp2(scores * scale - new[:, None])
    fade = tl.exp2(largest - new)
    found = tl.dot(shares.to(v.dtype), v, found * fade[:, None])
    return found, total * fade + tl.sum(shares, 1), new


@triton.jit
def attend_tile(
    qkv,
    out,
    row,
    length,
    stride,
    out_stride,
    scale,
    heads: tl.constexpr,
    depth: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    last_keys: tl.constexpr,
):
    """`queries` queries of a head from `row` on, and all keys. Softmax is kept in powers of two."""
    column = tl.arange(0, depth)
    at = row + tl.arange(0, queries)
    inside = (at < length)[:, None]
    q = tl.load(qkv + at[:, None] * stride + column[None], mask=inside, other=0.0)
    largest = tl.full((queries,), float("-inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    found = tl.zeros((queries, depth), tl.float32)
    whole = length // keys * keys
    for first in range(0, whole, keys):
        place = (first + tl.arange(0, keys))[:, None] * stride + column[None]
        k = tl.load(qkv + heads * depth + place)
        v = tl.load(qkv + 2 * heads * depth + place)
        found, total, largest = gather(tl.dot(q, k.T), v, found, total, largest, scale)
    if last_keys > 0:
        key = whole + tl.arange(0, last_keys)
        place = key[:, None] * stride + column[None]
        there = key < length
        k = tl.load(qkv + heads * depth + place, mask=there[:, None], other=0.0)
        v = tl.load(qkv + 2 * heads * depth + place, mask=there[:, None], other=0.0)
        scores = tl.where(there[None], tl.dot(q, k.T), float("-inf"))
        found, total, largest = gather(scores, v, found, total, largest, scale)
    found = (found / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * out_stride + column[None], found, mask=inside)


@triton.jit
def attend_kernel(
    qkv,
    out,
    length,
    stride,
    out_stride,
    scale,
    heads: tl.constexpr,
    depth: tl.constexpr,
    queries: tl.constexpr,
    last_queries: tl.constexpr,
    keys: tl.constexpr,
    last_keys: tl.constexpr,
):
    """A tile of queries of one head of one sequence; the last tile may be a smaller one."""
    row, head, sequence = tl.program_id(0) * queries, tl.program_id(1), tl.program_id(2)
    first = (sequence * length).to(tl.int64)
    qkv += first * stride + head * depth
    out += first * out_stride + head * depth
    if row + queries <= length or last_queries == queries:
        attend_tile(
            qkv,
            out,
            row,
            length,
            stride,
            out_stride,
            scale,
            heads,
            depth,
            queries,
            keys,
            last_keys,
        )
    else:
        attend_tile(
            qkv,
            out,
            row,
            length,
            stride,
            out_stride,
            scale,
            heads,
            depth,
            last_queries,
            keys,
            last_keys,
        )


def last_tile(length: int, tile: int) -> int:
    """Return how large a tile is for what is left of `length` after whole ones: 0 for nothing."""
    rest = length % tile
    return max(LEAST, triton.next_power_of_2(rest)) if rest else 0


def attend_short(qkv: Tensor, length: int) -> Tensor:
    """Return what every head found, where all sequences have `length` tokens.

    Tokens that are not finite reach their own sequence alone, since no other is read.

    Shapes: qkv [T, 3, H, K], contiguous, K a power of two from 16 on -> [T, H, K].
    """
    rows, _, heads, depth = qkv.shape
    out = qkv.new_empty(rows, heads, depth)
    grid = (triton.cdiv(length, QUERIES), heads, rows // length)
    launch = attend_kernel[grid]  # pyright: ignore[reportIndexIssue]
    launch(
        qkv,
        out,
        length,
        qkv.stride(0),
        out.stride(0),
        depth**-0.5 * LOG2_E,
        heads,
        depth,
        QUERIES,
        last_tile(length, QUERIES) or QUERIES,
        KEYS,
        last_tile(length, KEYS),
        num_warps=4,
        num_stages=3,
    )
    return out
