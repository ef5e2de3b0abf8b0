"""Blocks on a CPU in fp32 without gradients: their matmuls by oneDNN, which has AVX-512 kernels.

torch gives fp32 matmuls to MKL, which runs its kernels for AVX2 on AMD's CPUs: 105 GFLOP/s on a
core of Zen 5, where oneDNN does 225 (benchmarks/LOG.md). oneDNN adds up to 1,000 products of a sum
in one run, so its error is 1.4 to 2.2 times MKL's. Sums are therefore taken in parts of `RUN`
columns, which makes the errors equal.
"""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from packvit.fast.autograd import wants_grad
from packvit.model.activations import activate
from packvit.model.attention import Backend
from packvit.model.embeddings import CosSin
from packvit.model.layers import MLP, Attention, Block, Blocks, GatedMLP, split_gate_up
from packvit.model.linear import ROWS, KeylessBiasLinear, Linear, fill
from packvit.model.norms import Tokens
from packvit.model.rotary import rotate
from packvit.packs.segments import Segments, WindowSegments

CAPABILITY = "AVX512"  # of the CPUs where oneDNN was measured

RUN = 192  # columns whose products are one sum: by 256 the error is 1.05 to 1.17 times MKL's
FEW = 32  # rows: below, copying the weight by columns takes longer than MKL's matmul


def onednn_linear() -> Callable[..., Tensor] | None:
    """Return torch's linear layer by oneDNN, or None where torch has none or is told not to use it.

    It is what `torch.compile` calls, and has no public name.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def can_multiply(blocks: Blocks, x: Tokens) -> bool:
    """Return whether matmuls of tokens such as `x` may be oneDNN's: it knows values alone.

    So not where a gradient, a tangent, a graph or a count of operations is to be made of them.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 2
        and len(x) > 0
        and torch.backends.cpu.get_cpu_capability() == CAPABILITY
        and onednn_linear() is not None
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] # its only name
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and not wants_grad(blocks, x)
    )


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

    Blocks add to the stream in place, so the caller's is copied first.
    """
    x = x.clone(memory_format=torch.contiguous_format)
    tapped = {}
    for layer, block in enumerate(blocks.blocks()):
        run_block_(block, x, WindowSegments.of_layer(layer, segments, windows), rotary, backend)
        if layer in taps:
            tapped[layer] = x.clone()
    return x, tapped


def run_block_(
    block: Block, x: Tokens, segments: Segments, rotary: CosSin | None, backend: Backend
) -> None:
    """Add to the stream `x` what attention and the MLP add."""
    found = attend(block.attention_norm(x), block.attention, segments, rotary, backend)
    x.add_(block.attention_scale(found))
    del found
    hidden = mlp_hidden(block.mlp_norm(x), block.mlp)
    x.add_(block.mlp_scale(linear(hidden, block.mlp.down)))


def attend(
    h: Tokens, attention: Attention, segments: Segments, rotary: CosSin | None, backend: Backend
) -> Tokens:
    """Return what attention returns."""
    query, key, value = linear(h, attention.qkv).unflatten(-1, (3, attention.heads, -1)).unbind(-3)
    if rotary is not None:
        query, key = (rotate(heads, *rotary).to(value.dtype) for heads in (query, key))
    return linear(backend.run(query, key, value, segments, segments).flatten(-2), attention.out)


def mlp_hidden(h: Tokens, mlp: MLP | GatedMLP) -> Tensor:
    """Return what `mlp.down` reads. Shapes: [T, D] -> [T, M]."""
    if isinstance(mlp, GatedMLP):
        gate, up = split_gate_up(linear(h, mlp.gate_up))
        return activate(gate, mlp.activation, mlp.invariant).mul_(up)
    return linear(h, mlp.up, partial(activate, activation=mlp.activation, invariant=mlp.invariant))


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is a matrix as oneDNN takes it, and no adapter, shard or view."""
    if type(layer) not in (Linear, KeylessBiasLinear):
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()


def unchanged(found: Tensor) -> Tensor:
    """Return what is given."""
    return found


def linear(
    tokens: Tensor, layer: nn.Module, after: Callable[[Tensor], Tensor] = unchanged
) -> Tensor:
    """Return after(layer(tokens)), where `after` looks at single numbers.

    If the layer is `invariant`, every matmul has the same number of rows, as in `model/linear.py`.
    """
    multiply = onednn_linear()
    if multiply is None or not isinstance(layer, Linear) or not is_plain(layer):
        return after(layer(tokens))
    if len(tokens) < FEW and not layer.invariant:
        return after(layer(tokens))
    bias = layer.whole_bias() if isinstance(layer, KeylessBiasLinear) else layer.bias
    weights = [part.contiguous() for part in layer.weight.split(RUN, dim=1)]
    rows = ROWS if layer.invariant else ROWS * torch.get_num_threads()  # few: caches hold them
    found = tokens.new_empty(len(tokens), len(layer.weight))
    for piece, place in zip(tokens.contiguous().split(rows), found.split(rows), strict=True):
        filled = fill(piece, rows) if layer.invariant else piece
        place.copy_(after(add_parts(multiply, filled, weights, bias))[: len(piece)])
    return found


def add_parts(
    multiply: Callable[..., Tensor], tokens: Tensor, weights: list[Tensor], bias: Tensor | None
) -> Tensor:
    """Return tokens @ weight.T + bias, each part of `RUN` columns summed by itself.

    Columns of the weight are copied, because oneDNN takes 1,000 times as long with strides there.
    """
    first, *others = zip(tokens.split(RUN, dim=1), weights, strict=True)
    total = multiply(*first, bias, "none", [], "")
    for columns, weight in others:
        total.add_(multiply(columns, weight, None, "none", [], ""))
    return total
