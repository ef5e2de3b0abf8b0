"""What stands between a block's matmuls: norms with the residual they end, gates, activations.

Each step has a plain way, which is what training, fp32 and CPUs run; a fused one for inference in
16 bits on CUDA; and one that leaves its result in 8 bits where an fp8 matmul reads it. `STEPS` is
the table of all, and what the tests compare.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from packvit.config import Activation
from packvit.linear import Linear, Linear8, Rows8

HAS_TRITON = find_spec("triton") is not None

Tokens = Float[Tensor, "T D"]
Way = Literal["plain", "fused", "float8"]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU. Source: CLIP, model.py."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


class RMSNorm(nn.Module):
    """Divide by the root mean square, in fp32 within, and scale.

    The reference rounds to the input's dtype before it scales; we round once, after.
    """

    bias = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tokens) -> Tokens:
        """Normalise each token by itself."""
        # Under autocast patches come in bf16 to fp32 weights, for which torch has no fused kernel.
        values = hidden_states.to(self.weight.dtype)
        return F.rms_norm(values, self.weight.shape, self.weight, self.eps)


Norm = RMSNorm | nn.LayerNorm


def may_fuse(tokens: Tensor, *weights: Tensor) -> bool:
    """Return whether fused steps may run: on CUDA, in 16 bits throughout, for inference.

    They know no derivative. cuBLASLt's GELU is not exact in fp32: SigLIP2's taps would be off by
    6e-6 where the reference's own error is 1e-6.
    """
    if not tokens.is_cuda or tokens.dtype not in (torch.bfloat16, torch.float16):
        return False
    if any(weight.dtype != tokens.dtype for weight in weights):  # autocast over fp32 weights
        return False
    taught = tokens.requires_grad or any(weight.requires_grad for weight in weights)
    return not (taught and torch.is_grad_enabled())


def add_norm(
    stream: Tokens, delta: Tokens | None, norm: Norm, reader: nn.Module
) -> tuple[Tokens, Tokens | Rows8]:
    """Return stream + delta, and the same normed as `reader` wants it: the residual's one pass."""
    if isinstance(reader, Linear8):
        way: Way = "float8"
    else:
        way = "fused" if HAS_TRITON and may_fuse(stream, norm.weight) else "plain"
    return STEPS["add_norm"][way](stream, delta, norm)


def add_norm_plain(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Tokens]:
    """Two or three passes over memory."""
    stream = stream if delta is None else stream + delta
    return stream, norm(stream)


def add_norm_fused(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Tokens]:
    """One pass: the sum is rounded once, and what is normed is the rounded sum, as in the twin."""
    from packvit.kernels import add_norm as kernel

    summed, normed = kernel(stream, delta, norm.weight, norm.bias, norm.eps)
    return stream if delta is None else summed, normed


def add_norm_8(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Rows8]:
    """One pass, what is normed going to 8 bits without being rounded to 16 before."""
    from packvit.kernels import add_norm_8 as kernel

    summed, values, scale = kernel(stream, delta, norm.weight, norm.bias, norm.eps)
    return stream if delta is None else summed, Rows8(values, scale)


def gate(gate_up: Tensor, activation: Activation, reader: nn.Module) -> Tensor | Rows8:
    """Return act(gate) * up for the two side by side. Shapes: [T, 2 M] -> [T, M]."""
    if isinstance(reader, Linear8):
        way: Way = "float8"
    else:
        fits = activation == "silu" and HAS_TRITON
        way = "fused" if fits and may_fuse(gate_up) else "plain"
    return STEPS["gate"][way](gate_up, activation)


def gate_plain(gate_up: Tensor, activation: Activation) -> Tensor:
    """Two strided reads and a write, twice."""
    gates, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gates) * up


def gate_fused(gate_up: Tensor, activation: Activation) -> Tensor:
    """SwiGLU in one pass."""
    from packvit.kernels import silu_times

    assert activation == "silu"
    return silu_times(gate_up)


def gate_8(gate_up: Tensor, activation: Activation) -> Rows8:
    """One pass, to 8 bits without being rounded to 16 before."""
    from packvit.kernels import activate_8

    return Rows8(*activate_8(gate_up, activation, True))


def rise(
    tokens: Tokens | Rows8, up: nn.Module, activation: Activation, reader: nn.Module
) -> Tensor | Rows8:
    """Return act(up(tokens)), the first half of an MLP. Shapes: [T, D] -> [T, M]."""
    if isinstance(reader, Linear8):
        way: Way = "float8"
    else:
        way = "fused" if can_rise_fused(tokens, up, activation) else "plain"
    return STEPS["rise"][way](tokens, up, activation)


def can_rise_fused(tokens: Tokens | Rows8, up: nn.Module, activation: Activation) -> bool:
    """Return whether the matmul has an epilogue for this activation, and may use it."""
    # Exactly ours: what wraps a linear layer to change what it does (LoRA) is left to do so.
    if not (isinstance(tokens, Tensor) and type(up) is Linear and activation == "gelu_tanh"):
        return False
    return not up.steady and up.bias is not None and may_fuse(tokens, up.weight, up.bias)


def rise_plain(tokens: Tokens, up: nn.Module, activation: Activation) -> Tensor:
    """A matmul and a pass."""
    return ACTIVATIONS[activation](up(tokens))


def rise_fused(tokens: Tokens, up: Linear, activation: Activation) -> Tensor:
    """GELU in the matmul's epilogue, without writing what stands between to memory.

    cuBLASLt applies it to the fp32 sums, so it rounds once where its plain twin rounds twice. torch
    has no derivative for it. Its gain is in benchmarks/LOG.md.
    """
    assert activation == "gelu_tanh"
    fused = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue] # its only name
    return fused(up.bias, tokens, up.weight.t(), use_gelu=True)


def rise_8(tokens: Tokens | Rows8, up: nn.Module, activation: Activation) -> Rows8:
    """A matmul and a pass, to 8 bits without being rounded to 16 again."""
    from packvit.kernels import activate_8

    return Rows8(*activate_8(up(tokens), activation, False))


STEPS: dict[str, dict[Way, Callable]] = {
    "add_norm": {"plain": add_norm_plain, "fused": add_norm_fused, "float8": add_norm_8},
    "gate": {"plain": gate_plain, "fused": gate_fused, "float8": gate_8},
    "rise": {"plain": rise_plain, "fused": rise_fused, "float8": rise_8},
}
