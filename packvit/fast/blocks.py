"""The blocks of `model/layers.py` in fewer passes over memory, with the same numbers to rounding.

Each residual is added by the norm that comes next. `choose_blocks` says once a forward whether that
applies; deleting this file would change nothing but the speed.
"""

from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packvit.fast import cpu
from packvit.fast.attention import attend, is_batch
from packvit.fast.autograd import wants_grad
from packvit.fast.caches import keep_kernels
from packvit.fast.hooks import is_hooked
from packvit.fast.steps import Delta, add_norm, mlp_hidden, project
from packvit.model.attention import Backend
from packvit.model.capability import is_too_old
from packvit.model.embeddings import CosSin
from packvit.model.layers import MLP, Attention, Block, Blocks, GatedMLP, first_linear
from packvit.model.linear import Linear
from packvit.model.norms import RMSNorm, Tokens
from packvit.packs.segments import Segments, WindowSegments

HAS_TRITON = find_spec("triton") is not None

RunBlocks = Callable[..., tuple[Tokens, dict[int, Tokens]]]  # what Blocks.forward takes and returns


def choose_blocks(blocks: Blocks, x: Tokens) -> RunBlocks:
    """Return what runs the blocks on tokens such as `x`: one of ours, or the blocks themselves."""
    if x.is_cuda:
        keep_kernels()  # before the first is imported
    if not can_run(blocks, x):
        return blocks
    return partial(run_blocks if x.is_cuda else cpu.run_blocks, blocks)


def can_run(blocks: Blocks, x: Tokens) -> bool:
    """Return whether a `run_blocks` applies: this one on a recent GPU in 16 bits, or the CPU's.

    Blocks must be unwatched and of one dtype. Matrices may be anything, since what is no plain
    `Linear` is called; norms must be ours.
    """
    # What is compiled is fused by the compiler. A subclass of Tensor cannot be given to a kernel.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if not (can_hold(x) or cpu.can_multiply(blocks, x)):
        return False
    return not is_hooked(blocks) and all(fits(block, x.dtype) for block in blocks.layers)


def can_hold(x: Tokens) -> bool:
    """Return whether our kernels run on tokens such as `x`; Triton has bfloat16 from 8.0 on."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return HAS_TRITON and x.is_cuda and half and not is_too_old(x.device)


def fits(block: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a block is of ours, and its parts of `dtype` and unwatched."""
    if type(block) is not Block or block._compiled_call_impl is not None:
        return False
    if block.mlp.activation == "relu":  # our kernels have none: one text tower is built with it
        return False
    if type(block.attention) is not Attention or type(block.mlp) not in (MLP, GatedMLP):
        return False
    for norm in (block.attention_norm, block.mlp_norm):
        if type(norm) not in (RMSNorm, nn.LayerNorm) or norm.weight.dtype != dtype:
            return False
    for module in block.modules():
        if is_hooked(module) or (isinstance(module, Linear) and module.weight.dtype != dtype):
            return False
    return True


def run_blocks(
    blocks: Blocks,
    x: Tokens,
    segments: Segments,
    rotary: CosSin | None,
    backend: Backend,
    taps: Collection[int] = (),
    windows: WindowSegments | None = None,
) -> tuple[Tokens, dict[int, Tokens]]:
    """Return what `blocks` do: the residual stream after the last block, and after each in `taps`.

    In inference matmuls write to the stream, so the caller's is copied first.
    """
    needs_grad = wants_grad(blocks, x)
    if not needs_grad:
        x = x.clone(memory_format=torch.contiguous_format)
    # Another kernel for sequences of one length is another rounding, which `invariant` excludes.
    batched = {
        kind: is_batch(kind.lengths) and not blocks.invariant
        for kind in (segments, *([windows.segments] if windows else []))
    }
    tapped, delta = {}, None
    for layer, block in enumerate(blocks.blocks()):
        own = WindowSegments.of_layer(layer, segments, windows)
        arguments = {"segments": own, "rotary": rotary, "backend": backend}
        step = partial(run_block, block, **arguments, batched=batched[own])
        if block.recomputed and needs_grad:
            x, delta = checkpoint(step, x, delta, needs_grad=needs_grad, use_reentrant=False)
        else:
            x, delta = step(x, delta, needs_grad=needs_grad)
        if layer in taps:
            tapped[layer] = x.clone() if delta is None else add(x, delta)
    return x if delta is None else add(x, delta), tapped


def run_block(
    block: Block,
    x: Tokens,
    delta: Delta | None,
    segments: Segments,
    rotary: CosSin | None,
    backend: Backend,
    batched: bool,
    needs_grad: bool,
) -> tuple[Tokens, Delta | None]:
    """Return (x, delta): the residual stream after the block is x + delta."""
    attention, mlp = block.attention, block.mlp
    x, h = add_norm(x, delta, block.attention_norm, attention.qkv, needs_grad)
    qkv, heads = attention.qkv(h), attention.heads
    h = attend(qkv, heads, segments, rotary, backend, needs_grad, batched)
    x, delta = project(x, h, attention.out, block.attention_scale, needs_grad)
    x, h = add_norm(x, delta, block.mlp_norm, first_linear(mlp), needs_grad)
    return project(x, mlp_hidden(h, mlp, needs_grad), mlp.down, block.mlp_scale, needs_grad)


def add(x: Tokens, delta: Delta) -> Tokens:
    """Return x + delta, where no norm comes next."""
    return x + (delta.tokens if delta.factor is None else delta.tokens * delta.factor)
