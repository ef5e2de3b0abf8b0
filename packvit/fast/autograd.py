"""Steps of a block with kernels for their derivative too: what training in 16 bits runs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wants_grad(blocks: nn.Module, x: Tensor) -> bool:
    """Return whether gradients of what the blocks make of `x` may be asked for."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in blocks.parameters())
    )


class AddNorm(torch.autograd.Function):
    """The sum of two, where there is a second, and its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return stream + delta, which is empty where there is no delta, and the norm."""
        from packvit.fast.kernels.norms import add_norm as kernel

        summed, normed = kernel(stream, delta, None, weight, bias, eps)
        ctx.save_for_backward(stream if delta is None else summed, weight)
        ctx.centred, ctx.adds, ctx.eps = bias is not None, delta is not None, eps
        ctx.set_materialize_grads(False)
        return stream.new_empty(0) if delta is None else summed, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, passed: Tensor | None, given: Tensor | None
    ) -> tuple[Any, ...]:
        """Return the gradient of both summands, and those of the norm's weights."""
        from packvit.fast.kernels.norms import add_norm_backward

        if given is None:
            return passed, passed if ctx.adds else None, None, None, None
        summed, weight = ctx.saved_tensors
        passed = passed if ctx.adds and passed is not None else None
        both = None if passed is None else passed.contiguous()
        out, weights = add_norm_backward(
            summed, given.contiguous(), both, weight, ctx.centred, ctx.eps
        )
        scale, *shift = weights.to(weight.dtype).unbind()
        return out, out if ctx.adds else None, scale, *shift, *(None,) * (2 - len(shift))


class SiluMul(torch.autograd.Function):
    """silu(gate) * up of both in turns."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Return it in one pass."""
        from packvit.fast.kernels.gates import silu_mul

        ctx.save_for_backward(gate_up)
        return silu_mul(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, given: Tensor
    ) -> Tensor:
        """Return the gradients of both in turns, in one pass."""
        from packvit.fast.kernels.gates import silu_mul_backward

        [gate_up] = ctx.saved_tensors
        return silu_mul_backward(gate_up, given.contiguous())


class LinearAct(torch.autograd.Function):
    """act(tokens @ weight.T + bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str,
        activate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return it by a matmul and a pass."""
        hidden = F.linear(tokens, weight, bias)
        ctx.save_for_backward(tokens if weight.requires_grad else None, weight, hidden)
        ctx.activation = activation
        return activate(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # as torch calls it
        ctx: Any, given: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor, None, None]:
        """Return the gradients; that of the bias comes with the activation's one pass."""
        from packvit.fast.kernels.activations import activate_backward

        tokens, weight, hidden = ctx.saved_tensors
        given, bias = activate_backward(hidden, given.contiguous(), ctx.activation)
        before = given @ weight if ctx.needs_input_grad[0] else None
        own = None if tokens is None else given.t() @ tokens
        return before, own, bias.to(weight.dtype), None, None
