"""Attention within each sequence of a pack, by the best backend that can run.

A backend is a row of `BACKENDS`: a name, `run`, `obstacle`, which answers in words why it cannot
run on given tensors (or None if it can), and whether we have run and measured it ourselves, since
`auto` takes no other. Adding a backend means adding a row; the row is at once its guard, its error
message and its line in `packvit info`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from packvit.model.capability import HOPPER, OLDEST, Capability, capability
from packvit.packs.segments import Segments

Heads = Float[Tensor, "T H K"]
Queries = Float[Tensor, "Q H K"]
Run = Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]


class AttentionInputs(NamedTuple):
    """What decides whether a backend can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> "AttentionInputs":
        """Return the inputs of weights in `dtype`, or as autocast would have them now."""
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return cls(device, dtype, head_dim)


class Backend(NamedTuple):
    """One way to compute attention."""

    name: str
    title: str
    run: Run
    obstacle: Callable[[AttentionInputs], str | None]  # completes "it cannot run because ..."
    measured: bool  # run and measured by us: "auto" takes no other
    varlen: bool = True  # one launch whatever the lengths, so that a CUDA graph can hold it


def flash_obstacle(
    inputs: AttentionInputs, oldest: Capability, largest: int, *, newest: int | None = None
) -> str | None:
    """Return why no flash-attention kernel can run: all need half precision and a recent GPU.

    `newest` is the last generation of GPUs that the kernel is built for, or None for all.
    """
    if inputs.device.type != "cuda":
        return f"it needs CUDA tensors and these are on {inputs.device}"
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16 and these are {inputs.dtype}"
    found = capability(inputs.device)
    if found is not None and found < oldest:
        return f"it needs compute capability {oldest[0]}.{oldest[1]} and {inputs.device} is older"
    if found is not None and newest is not None and found[0] > newest:
        return f"it is built for compute capability {newest}.x and {inputs.device} is newer"
    head_dim = inputs.head_dim
    if head_dim % 8 or head_dim > largest:
        return f"it needs a head_dim divisible by 8, up to {largest}, and this one is {head_dim}"
    return None


# Sequences of one launch of FlashAttention-2, which lays them along the second axis of the grid.
MOST_SEQUENCES = 65_535


def run_in_launches(
    kernel: Run,
    query: Queries,
    key: Heads,
    value: Heads,
    queries: Segments,
    keys: Segments,
    *,
    most: int = MOST_SEQUENCES,
) -> Queries:
    """Return what `kernel` returns, called for at most `most` sequences at a time."""
    if len(queries.lengths) <= most:
        return kernel(query, key, value, queries, keys)
    asked, held = queries.split(most), keys.split(most)
    parts = query.split([each.tokens for each in asked])
    tokens = [each.tokens for each in held]
    calls = zip(parts, key.split(tokens), value.split(tokens), asked, held, strict=True)
    return torch.cat([kernel(*call) for call in calls if len(call[0])])


def varlen_arguments(queries: Segments, keys: Segments) -> tuple[Tensor, Tensor, int, int]:
    """Return the arguments of all varlen kernels after query, key and value, in order."""
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen


# FlashAttention-4's gradient of queries is wrong where this does not divide their head_dim (seen in
# 4.0.0b36): the kernel accumulates it by sixteens, and what reads it goes by 32. Zeros behind
# change no result.
FA4_HEAD_DIM = 32


def run_fa4(query: Queries, key: Heads, value: Heads, queries: Segments, keys: Segments) -> Queries:
    """FlashAttention-4, by the signature of flash-attn-4 4.0.0b36.

    It multiplies the values behind a sequence's end by zero, so that a NaN there would reach the
    sequence. In inference such values become zero and the key at their place NaN, which keeps them
    in their own sequence; in training a NaN ends in the sum of losses anyway.
    """
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports] # extra "hopper"
        flash_attn_varlen_func,
    )

    head_dim = query.shape[-1]
    if torch.is_grad_enabled() and any(heads.requires_grad for heads in (query, key, value)):
        missing = -head_dim % FA4_HEAD_DIM
        query, key, value = (F.pad(heads, (0, missing)) for heads in (query, key, value))
    else:
        finite = value.isfinite()
        key = torch.where(finite, key, key.new_full((), float("nan")))
        value = torch.where(finite, value, value.new_zeros(()))
    out, _ = flash_attn_varlen_func(
        query, key, value, **fa4_arguments(queries, keys), softmax_scale=head_dim**-0.5
    )
    return out[..., :head_dim]


def fa4_arguments(queries: Segments, keys: Segments) -> dict[str, Any]:
    """Return the varlen arguments under FlashAttention-4's names."""
    return {
        "causal": keys.causal,
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }


def fa4_obstacle(inputs: AttentionInputs) -> str | None:
    """Return why FlashAttention-4 cannot run; its wheel is for Hopper and newer."""
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash_attn.cute is not installed; pip install 'packvit[hopper]'"
    return flash_obstacle(inputs, HOPPER, 128, newest=10)


def run_fa3(query: Queries, key: Heads, value: Heads, queries: Segments, keys: Segments) -> Queries:
    """FlashAttention-3, built from its repository's `hopper` folder."""
    from flash_attn_interface import (  # pyright: ignore[reportMissingImports] # built by hand
        flash_attn_varlen_func,
    )

    arguments = varlen_arguments(queries, keys)
    out = flash_attn_varlen_func(query, key, value, *arguments, causal=keys.causal)
    return out[0] if isinstance(out, tuple) else out  # older builds return (out, lse)


def fa3_obstacle(inputs: AttentionInputs) -> str | None:
    """Return why FlashAttention-3 cannot run; it is built from source, for Hopper alone."""
    if find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed; build FlashAttention-3 from its repository"
    return flash_obstacle(inputs, HOPPER, 256, newest=9)


def run_fa2(query: Queries, key: Heads, value: Heads, queries: Segments, keys: Segments) -> Queries:
    """FlashAttention-2, from flash-attn."""
    from flash_attn import (  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue] # extra "flash"
        flash_attn_varlen_func,
    )

    def launch(q: Queries, k: Heads, v: Heads, queries: Segments, keys: Segments) -> Queries:
        arguments = varlen_arguments(queries, keys)
        return flash_attn_varlen_func(q, k, v, *arguments, causal=keys.causal)

    return run_in_launches(launch, query, key, value, queries, keys)


def fa2_obstacle(inputs: AttentionInputs) -> str | None:
    """flash-attn-4 brings a `flash_attn` folder too, so the compiled part is what we look for."""
    if find_spec("flash_attn_2_cuda") is None:
        return "flash-attn is not installed; pip install --no-build-isolation 'packvit[flash]'"
    return flash_obstacle(inputs, OLDEST, 256)


def run_torch(
    query: Queries, key: Heads, value: Heads, queries: Segments, keys: Segments
) -> Queries:
    """All sequences in one kernel, whatever their lengths: torch's FlashAttention-2.

    More than `MOST_SEQUENCES` take several launches.

    Since 2.14 torch takes cuDNN by itself, forward and backward, unless a window is asked for. One
    as wide as the longest sequence leaves nothing out, and FlashAttention takes it for none. A
    window that ends at the token itself is what causal means.

    Source: torch 2.14.1, nn/attention/varlen.py, `_can_use_cudnn`; pytorch#187770.
    """
    from torch.nn.attention.varlen import varlen_attn  # only where a CUDA device wants it

    window = (keys.max_seqlen, 0 if keys.causal else keys.max_seqlen)

    def launch(q: Queries, k: Heads, v: Heads, queries: Segments, keys: Segments) -> Queries:
        out = varlen_attn(q, k, v, *varlen_arguments(queries, keys), window_size=window)
        assert isinstance(out, Tensor)  # a tuple comes back only with auxiliary outputs
        return out

    return run_in_launches(launch, query, key, value, queries, keys)


def torch_obstacle(inputs: AttentionInputs) -> str | None:
    """Return why the FlashAttention-2 inside torch cannot run."""
    return flash_obstacle(inputs, OLDEST, 256)


def run_sdpa(
    query: Queries, key: Heads, value: Heads, queries: Segments, keys: Segments
) -> Queries:
    """One unmasked call for each distinct length, wherever in the pack its sequences stand.

    Sequences of equal length are a plain batch, so no mask is built and no token is padded: the
    result is that of attending to each sequence alone.
    """
    members: dict[tuple[int, int, int], list[int]] = {}  # by lengths, and by the launch
    for sequence, lengths in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        members.setdefault((*lengths, sequence // MOST_SEQUENCES), []).append(sequence)
    results: list[Tensor] = [query] * len(queries.lengths)
    parts = query.split(queries.lengths), key.split(keys.lengths), value.split(keys.lengths)
    for (asked, held, _), sequences in members.items():
        q = batch(query, parts[0], queries.starts, sequences, asked)
        k = batch(key, parts[1], keys.starts, sequences, held)
        v = batch(value, parts[2], keys.starts, sequences, held)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=keys.causal).transpose(1, 2)
        for sequence, result in zip(sequences, out.unbind(0), strict=True):
            results[sequence] = result
    return torch.cat(results)


def batch(
    heads: Heads,
    parts: Sequence[Tensor],
    starts: Sequence[int],
    sequences: Sequence[int],
    length: int,
) -> Tensor:
    """Lay sequences of one length side by side: a view of one or of neighbours, else a copy.

    `parts` are all sequences, by one split: the gradient of a slice for each would be as many
    tensors of T rows.

    Shapes: [T, H, K] -> [sequences, H, length, K].
    """
    first, count = sequences[0], len(sequences)
    if sequences[-1] - first == count - 1:
        run = heads[starts[first] : starts[first] + length * count]
        return run.unflatten(0, (count, length)).transpose(1, 2)
    return torch.stack([parts[sequence] for sequence in sequences]).transpose(1, 2)


BACKENDS = (  # fastest first: "auto" takes the first measured one without an obstacle
    Backend("fa4", "FlashAttention-4 (flash_attn.cute)", run_fa4, fa4_obstacle, True),
    Backend("fa3", "FlashAttention-3 (flash_attn_interface)", run_fa3, fa3_obstacle, False),
    Backend("fa2", "FlashAttention-2 (flash_attn)", run_fa2, fa2_obstacle, False),
    Backend("torch", "torch.nn.attention.varlen", run_torch, torch_obstacle, True),
    Backend(
        "sdpa", "one SDPA call per distinct length", run_sdpa, lambda inputs: None, True, False
    ),
)


@cache
def resolve(name: str, inputs: AttentionInputs) -> Backend:
    """Return the backend called `name`, or for "auto" the best measured one that can run.

    Raises: ValueError if no backend has that name, or if the one that does cannot run here.
    """
    if name == "auto":
        return next(b for b in BACKENDS if b.measured and b.obstacle(inputs) is None)
    named = {backend.name: backend for backend in BACKENDS}
    if name not in named:
        raise ValueError(
            f'No attention backend is called "{name}". Choose auto or one of: {", ".join(named)}.'
        )
    if obstacle := named[name].obstacle(inputs):
        raise ValueError(
            f'Attention backend "{name}" cannot run: {obstacle}. Try `attention="auto"`.'
        )
    return named[name]


@cache
def opaque(backend: Backend) -> Backend:
    """Return the backend as torch.compile must take it: run as it is, and never traced into.

    `sdpa` groups sequences by their lengths in Python, which would be compiled again for every
    pack; the other kernels gain nothing from being traced.
    """
    return backend._replace(run=torch.compiler.disable(backend.run))


def attend(
    query: Heads, key: Heads, value: Heads, segments: Segments, *, backend: str = "auto"
) -> Heads:
    """Let every token attend to the tokens of its own sequence, scaled by 1 / sqrt(K).

    A token any of whose values is not finite leaves no token of its sequence finite.

    Shapes: query, key, value [T, H, K] -> [T, H, K].
    Raises: ValueError if `backend` is unknown or cannot run on these tensors, or if the segments
    describe another number of tokens.
    """
    if len(query) != segments.tokens:
        raise ValueError(
            f"query holds {len(query)} tokens, but the segments describe {segments.tokens}. "
            "Build both from the same grid_thw, with the same prefix tokens."
        )
    inputs = AttentionInputs(query.device, query.dtype, query.shape[-1])
    # A backend may write where values are not finite, and look at a token's first ones alone.
    finite = value.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    keys = key.clone(memory_format=torch.contiguous_format)
    values = torch.where(finite, value, value.new_full((), float("nan"))).contiguous()
    return resolve(backend, inputs).run(query, keys, values, segments, segments)
