"""FlashAttention-4 (flash-attn-4, the extra `hopper`): as its functions are, and for training.

Signatures are those of 4.0.0b36.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packvit.packs.segments import Segments

# Its gradient of queries is wrong where this does not divide their head_dim (seen in 4.0.0b36): the
# kernel accumulates it by sixteens, and what reads it goes by 32. Zeros behind change no result.
DEPTH = 32


def run_fa4(query: Tensor, key: Tensor, value: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """FlashAttention-4 of sequences, each query of which attends to keys of its own sequence.

    It multiplies the values behind a sequence's end by zero, so that NaN there would reach the
    sequence: hence `tame`, in inference, which writes to values and keys; in training a NaN ends in
    the sum of losses anyway.
    """
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports] # extra "hopper"
        flash_attn_varlen_func,
    )

    depth = query.shape[-1]
    if torch.is_grad_enabled() and any(heads.requires_grad for heads in (query, key, value)):
        query, key, value = (F.pad(heads, (0, -depth % DEPTH)) for heads in (query, key, value))
    else:
        from packvit.fast.kernels.heads import tame

        tame(value, key)
    out, _ = flash_attn_varlen_func(
        query,
        key,
        value,
        **keywords(queries, keys),
        softmax_scale=depth**-0.5,
    )
    return out[..., :depth]


def keywords(queries: Segments, keys: Segments) -> dict[str, Any]:
    """Return the seams under FlashAttention-4's names."""
    return {
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }


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
        seams = keywords(segments, segments)
        query, key, value = heads.unbind(1)
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, **seams, softmax_scale=ctx.scale, return_lse=True
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

        from packvit.fast.kernels.heads import widen

        heads, out, lse = ctx.saved_tensors
        depth, given = heads.shape[-1], given.contiguous()
        wide = -(-depth // DEPTH) * DEPTH
        if wide > depth:
            heads, out, given = (widen(x, wide) for x in (heads, out, given))
        found = torch.empty_like(heads)
        parts = dict(zip(("dq", "dk", "dv"), found.unbind(1), strict=True))
        seams = keywords(ctx.segments, ctx.segments)
        _flash_attn_bwd(
            *heads.unbind(1), out, given, lse, **seams, softmax_scale=ctx.scale, **parts
        )
        return (widen(found, depth) if wide > depth else found), None
