"""Attention in fewer passes: rotary positions in place, one gradient for q, k and v together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packvit.fast.int8 import is_hopper
from packvit.model.attention import FA4_HEAD_DIM, MOST_SEQUENCES, Backend, fa4_arguments
from packvit.model.embeddings import CosSin
from packvit.packs.segments import Segments

# Up to so many tokens, and for such heads, our kernel for sequences of one length takes less time
# than FlashAttention-4's (benchmarks/LOG.md). It reads no other sequence, so nothing is zeroed.
SHORT = 600
SHORT_HEAD_DIM = 64


def attend(
    qkv: Tensor,
    heads: int,
    segments: Segments,
    rotary: CosSin | None,
    backend: Backend,
    needs_grad: bool,
    batched: bool,
) -> Tensor:
    """Return what every head found, side by side; in inference `qkv` is written to.

    `batched` allows a kernel for sequences of one length, where `is_batch` says that they are.

    Its reference implementation is `model.layers.Attention`.

    Shapes: qkv [T, 3 D] -> [T, D].
    """
    whole = qkv.unflatten(-1, (3, heads, -1))
    if needs_grad:
        if rotary is not None:
            whole = RotateQueriesAndKeys.apply(whole, *rotary)
        if backend.name == "fa4":
            return PackedFa4.apply(whole, segments).flatten(-2)
        query, key, value = whole.unbind(-3)
        return backend.run(query, key, value, segments, segments).flatten(-2)
    query, key, value = whole.unbind(-3)
    if rotary is not None:
        rotate_queries_and_keys_(whole, *rotary)
    if backend.name == "fa4":
        if batched and is_short(whole, segments):
            from packvit.fast.kernels.short_attention import attend_short

            return attend_short(whole, segments.max_seqlen).flatten(-2)
        return run_fa4_(query, key, value, segments, batched).flatten(-2)
    return backend.run(query, key, value, segments, segments).flatten(-2)


def is_batch(lengths: Sequence[int]) -> bool:
    """Return whether a pack is a batch of several sequences of one length, for one launch.

    Its kernels lay sequences along the third axis of the grid, which CUDA limits as the second.
    """
    return 1 < len(lengths) <= MOST_SEQUENCES and min(lengths) == max(lengths)


def is_short(whole: Tensor, segments: Segments) -> bool:
    """Return whether sequences of one length have the kernel for short ones, on a Hopper GPU."""
    depth = whole.shape[-1]
    return (
        segments.max_seqlen <= SHORT
        and depth == SHORT_HEAD_DIM
        and not segments.causal
        and is_hopper(whole.device)
    )


def rotate_queries_and_keys_(
    whole: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False
) -> None:
    """Turn the queries and keys of `whole` [T, 3, H, K] in place, in one launch."""
    from packvit.fast.kernels.attention import rotate_

    rotate_(whole[:, :2].flatten(1, 2), cosine, sine, back=back)  # a view: they lie side by side


class RotateQueriesAndKeys(torch.autograd.Function):
    """Rotary positions of queries and keys that lie beside their values, with a derivative."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return them turned. Shapes: whole [T, 3, H, K]; cosine, sine [T, K]."""
        ctx.save_for_backward(cosine, sine)
        turned = whole.clone(memory_format=torch.contiguous_format)
        rotate_queries_and_keys_(turned, cosine, sine)
        return turned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, given: Tensor
    ) -> tuple[Tensor, None, None]:
        """Turn the gradient back, by the transpose: two of a pair may have angles of their own."""
        cosine, sine = ctx.saved_tensors
        sine = sine.roll(sine.shape[1] // 2, 1)
        turned = given.clone(memory_format=torch.contiguous_format)
        rotate_queries_and_keys_(turned, cosine, sine, back=True)
        return turned, None, None


def run_fa4_(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, batched: bool
) -> Tensor:
    """FlashAttention-4 in inference, as `model.attention.run_fa4`; writes to keys and values.

    Sequences of one length are a batch, for which its kernel needs no search for where a sequence
    begins: 0.73 of the time at 257 tokens, 0.93 at 1,029 (benchmarks/LOG.md). A batch may give
    other last bits than a pack of other lengths does, so `invariant` never asks for it.
    """
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports] # extra "hopper"
        flash_attn_func,
        flash_attn_varlen_func,
    )

    from packvit.fast.kernels.attention import zero_nonfinite_

    zero_nonfinite_(value, key)
    scale = query.shape[-1] ** -0.5
    if batched:
        sides = (len(segments.lengths), segments.max_seqlen)
        batch = (heads.unflatten(0, sides) for heads in (query, key, value))
        out, _ = flash_attn_func(*batch, softmax_scale=scale, causal=segments.causal)
        return out.flatten(0, 1)
    arguments = fa4_arguments(segments, segments)
    out, _ = flash_attn_varlen_func(query, key, value, **arguments, softmax_scale=scale)
    return out


class PackedFa4(torch.autograd.Function):
    """FlashAttention-4 of queries, keys and values of one tensor, whose gradient is one too.

    The parts that its own function consists of: that one would have heads widened for the forward
    as well, and gradients of three tensors put together after it.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, segments: Segments) -> Tensor:
        """Return what heads find. Shapes: [T, 3, H, K] -> [T, H, K]."""
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_fwd,
        )

        ctx.segments, ctx.scale = segments, heads.shape[-1] ** -0.5
        arguments = fa4_arguments(segments, segments)
        query, key, value = heads.unbind(1)
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, **arguments, softmax_scale=ctx.scale, return_lse=True
        )
        ctx.save_for_backward(heads, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, given: Tensor
    ) -> tuple[Tensor, None]:
        """Return the gradients of all three in one tensor."""
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_bwd,
        )

        from packvit.fast.kernels.attention import widen

        heads, out, lse = ctx.saved_tensors
        depth, given = heads.shape[-1], given.contiguous()
        wide = -(-depth // FA4_HEAD_DIM) * FA4_HEAD_DIM
        if wide > depth:
            heads, out, given = (widen(x, wide) for x in (heads, out, given))
        found = torch.empty_like(heads)
        parts = dict(zip(("dq", "dk", "dv"), found.unbind(1), strict=True))
        arguments = fa4_arguments(ctx.segments, ctx.segments)
        _flash_attn_bwd(
            *heads.unbind(1), out, given, lse, **arguments, softmax_scale=ctx.scale, **parts
        )
        return (widen(found, depth) if wide > depth else found), None
