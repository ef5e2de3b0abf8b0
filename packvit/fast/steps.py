"""What a block does, in fewer passes over memory: norms with their residual, halves of an MLP.

Each step runs for inference or for training (`needs_grad`), in 16 bits on CUDA. A matrix that is
not a plain `Linear` (LoRA's) is called as the module it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from packvit.fast.autograd import AddNorm, LinearAct, SiluMul
from packvit.fast.int8 import (
    LinearInt8,
    QuantizedRows,
    QuantizedTiles,
    TiledLinearInt8,
    is_hopper,
)
from packvit.model.activations import ACTIVATIONS
from packvit.model.layers import MLP, GatedMLP, LayerScale, first_linear, split_gate_up
from packvit.model.linear import FLOOR, WORDS, Linear, fill, in_words
from packvit.model.norms import Norm, Tokens


class Delta(NamedTuple):
    """What is yet to be added to the residual stream: the next norm adds tokens * factor."""

    tokens: Tokens
    factor: Tensor | None  # of a LayerScale [D]


def add_norm(
    x: Tokens, delta: Delta | None, norm: Norm, reader: nn.Module, needs_grad: bool
) -> tuple[Tokens, Tokens | QuantizedRows]:
    """Return x + delta and its norm, in one kernel; in int8 where `reader` is a matrix in int8.

    Its reference implementation is norm(x + delta), or `reader.rows` of that.
    """
    tokens, factor = delta or (None, None)
    if needs_grad:
        assert factor is None  # a LayerScale has a derivative too, so it was called
        summed, normed = AddNorm.apply(x, tokens, norm.weight, norm.bias, norm.eps)
        return x if tokens is None else summed, normed
    from packvit.fast.kernels import norms as kernels

    if isinstance(reader, LinearInt8):
        summed, *rows = kernels.add_norm_int8(
            x,
            tokens,
            factor,
            reader.norm_weight,
            reader.norm_bias,
            norm.eps,
            reader.slots,
            len(reader.apart),
        )
        return summed, QuantizedRows(*rows)
    return kernels.add_norm(x, tokens, factor, norm.weight, norm.bias, norm.eps)


def project(
    x: Tokens, h: Tensor | QuantizedTiles, linear: nn.Module, scale: nn.Module, needs_grad: bool
) -> tuple[Tokens, Delta | None]:
    """Return (x, delta): x, and scale(linear(h)), which the next norm adds.

    In inference a matmul in int8, or without a bias, adds to `x` itself, in place, and leaves
    nothing.
    """
    if isinstance(h, QuantizedTiles):
        assert isinstance(linear, TiledLinearInt8)
        return linear.add_(x, h, scale.scale if isinstance(scale, LayerScale) else None), None
    adds = type(linear) is Linear and linear.bias is None and isinstance(scale, nn.Identity)
    if adds and not needs_grad and isinstance(linear, Linear):
        return add_linear_(x, h, linear), None
    if needs_grad or not isinstance(scale, LayerScale):
        return x, Delta(scale(linear(h)), None)
    return x, Delta(linear(h), scale.scale)


def add_linear_(x: Tokens, h: Tensor, linear: Linear) -> Tokens:
    """Return x + h @ weight.T, written where `x` is, unless `invariant` fills up few rows.

    Rounded once, from the fp32 sums.
    """
    h, weight = in_words(h), in_words(linear.weight)
    if linear.invariant and len(h) < FLOOR:
        return torch.addmm(fill(x, FLOOR), fill(h, FLOOR), weight.t())[: len(h)]
    return x.addmm_(h, weight.t())


def mlp_hidden(
    h: Tokens | QuantizedRows, mlp: MLP | GatedMLP, needs_grad: bool
) -> Tensor | QuantizedTiles:
    """Return what `mlp.down` reads. Shapes: [T, D] -> [T, M]."""
    first, int8 = first_linear(mlp), isinstance(mlp.down, TiledLinearInt8)
    if int8 and isinstance(first, LinearInt8) and not needs_grad:
        return first.act(h, mlp.activation, isinstance(mlp, GatedMLP))
    return gated_act(h, mlp, needs_grad) if isinstance(mlp, GatedMLP) else act(h, mlp, needs_grad)


def act(h: Tokens | QuantizedRows, mlp: MLP, needs_grad: bool) -> Tensor:
    """Return act(up(h))."""
    up, activation = mlp.up, mlp.activation
    if type(up) is Linear and isinstance(h, Tensor):
        if needs_grad and up.bias is not None and not up.invariant:
            return LinearAct.apply(h, up.weight, up.bias, activation, ACTIVATIONS[activation])
        if not needs_grad and activation == "gelu_tanh" and up.bias is not None:
            if not up.invariant:
                return linear_gelu_tanh(h, up)
        elif not needs_grad and up.out_features % WORDS == 0 and has_epilogue(up):
            from packvit.fast.kernels.matmuls import linear_act

            return linear_act(h, up.weight, up.bias, activation)
    return ACTIVATIONS[activation](up(h))


def linear_gelu_tanh(h: Tokens, up: Linear) -> Tensor:
    """Return gelu_tanh(up(h)), the activation in cuBLASLt's epilogue, which torch has no better
    name for. It is applied to the fp32 sums, so that it rounds once.
    """
    fused = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue] # its only name
    return fused(up.bias, h, up.weight.t(), use_gelu=True)


def has_epilogue(linear: Linear) -> bool:
    """Return whether our matmul with an activation takes a matrix: on Hopper, where it was made."""
    return linear.in_features % WORDS == 0 and is_hopper(linear.weight.device)


def gated_act(h: Tokens | QuantizedRows, mlp: GatedMLP, needs_grad: bool) -> Tensor:
    """Return act(gate(h)) * up(h)."""
    gate_up, activation = mlp.gate_up, mlp.activation
    if activation != "silu":
        gate, up = split_gate_up(gate_up(h))
        return ACTIVATIONS[activation](gate) * up
    if needs_grad:
        return SiluMul.apply(gate_up(h))
    takes_zeros = type(mlp.down) is Linear  # behind what it reads
    if type(gate_up) is Linear and takes_zeros and isinstance(h, Tensor) and has_epilogue(gate_up):
        from packvit.fast.kernels.matmuls import swiglu

        return swiglu(h, gate_up.weight, gate_up.bias)
    from packvit.fast.kernels.gates import silu_mul

    return silu_mul(gate_up(h))
