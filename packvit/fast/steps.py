"""What a block does around its matmuls: norms with the residual they end, gates, activations.

Each step has a plain way, which is what fp32 and CPUs run; a fused one for inference in 16 bits on
CUDA, and one for training there, with its derivative; and one that leaves its result in 8 bits
where an fp8 matmul reads it. `STEPS` is the table of all, and what the tests compare.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from packvit.config import Activation
from packvit.fast.autograd import AddNorm, Rise, SiluTimes
from packvit.fast.fp8 import Linear8, Rise8, Rows8
from packvit.model.linear import Linear, add_affine, is_hopper

HAS_TRITON = find_spec("triton") is not None

Tokens = Float[Tensor, "T D"]
Way = Literal["plain", "apart", "fused", "taught", "float8", "fused8"]


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
    return sixteen_bits(tokens, *weights) and not taught(tokens, *weights)


def sixteen_bits(tokens: Tensor, *weights: Tensor) -> bool:
    """Return whether all are of one dtype of 16 bits, on CUDA; under autocast weights are not."""
    if not tokens.is_cuda or tokens.dtype not in (torch.bfloat16, torch.float16):
        return False
    return all(weight.dtype == tokens.dtype for weight in weights)


def taught(tokens: Tensor, *weights: Tensor) -> bool:
    """Return whether a derivative may be asked for."""
    wanted = tokens.requires_grad or any(weight.requires_grad for weight in weights)
    return wanted and torch.is_grad_enabled()


def is_plain(module: nn.Module) -> TypeGuard[Linear]:
    """Return whether a module is a linear layer of ours and nothing watches or changes it.

    What wraps one (LoRA), or hooks into it (pruning, calibration), is left to do so.
    """
    return type(module) is Linear and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Return whether anything wants to see a module called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def is_plain_norm(norm: nn.Module) -> bool:
    """Return whether a module is one of our norms, and nothing watches or changes it."""
    return type(norm) in (RMSNorm, nn.LayerNorm) and not is_hooked(norm)


def choose(tokens: Tensor, *weights: Tensor) -> Way:
    """Return how a step with kernels of ours for inference and for training runs."""
    if not (HAS_TRITON and sixteen_bits(tokens, *weights)):
        return "plain"
    if not taught(tokens, *weights):
        return "fused"
    # What is compiled is fused by the compiler, derivatives too.
    return "plain" if torch.compiler.is_compiling() else "taught"


def add_norm(
    stream: Tokens, delta: Tokens | None, norm: Norm, reader: nn.Module
) -> tuple[Tokens, Tokens | Rows8]:
    """Return stream + delta, and the same normed as `reader` wants it: the residual's one pass."""
    if not is_plain_norm(norm):
        summed, normed = STEPS["add_norm"]["plain"](stream, delta, norm)
        # Who watches it may keep what it was given, and the stream is written to.
        return summed if torch.is_grad_enabled() else summed.clone(), normed
    if isinstance(reader, Linear8):
        return STEPS["add_norm"]["float8"](stream, delta, norm, reader)
    return STEPS["add_norm"][choose(stream, norm.weight)](stream, delta, norm)


def add_norm_plain(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Tokens]:
    """Two or three passes over memory."""
    stream = stream if delta is None else stream + delta
    return stream, norm(stream)


def add_norm_fused(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Tokens]:
    """One pass: the sum is rounded once, and what is normed is the rounded sum, as in the twin."""
    from packvit.fast.kernels.norms import add_norm as kernel

    summed, normed = kernel(stream, delta, norm.weight, norm.bias, norm.eps)
    return stream if delta is None else summed, normed


def add_norm_taught(stream: Tokens, delta: Tokens | None, norm: Norm) -> tuple[Tokens, Tokens]:
    """One pass forward, and one back, where its plain twin takes seven."""
    if delta is None:
        _, normed = AddNorm.apply(stream, None, norm.weight, norm.bias, norm.eps)
        return stream, normed
    return AddNorm.apply(stream, delta, norm.weight, norm.bias, norm.eps)


def add_norm_8(
    stream: Tokens, delta: Tokens | None, norm: Norm, reader: Linear8
) -> tuple[Tokens, Rows8]:
    """One pass, what is normed going to 8 bits without being rounded to 16 before."""
    from packvit.fast.kernels.norms import add_norm_8 as kernel

    weights, gated = reader.reaches
    summed, *rows = kernel(stream, delta, norm.weight, norm.bias, norm.eps, weights, gated)
    return stream if delta is None else summed, Rows8(*rows)


def add(
    stream: Tokens, tokens: Tensor | Rows8, linear: nn.Module, scale: nn.Module
) -> tuple[Tokens, Tokens | None]:
    """Add scale(linear(tokens)) to the stream, or return beside it what the next norm is to add.

    Added at once it is where the matmul can do so, which then writes `stream` itself.
    """
    way: Way = "fused" if can_add(stream, tokens, linear, scale) else "plain"
    return STEPS["add"][way](stream, tokens, linear, scale)


def can_add(stream: Tokens, tokens: Tensor | Rows8, linear: nn.Module, scale: nn.Module) -> bool:
    """Return whether a matmul can add to the stream: it does so only without a bias."""
    if not (isinstance(tokens, Tensor) and is_plain(linear) and linear.bias is None):
        return False
    # With gradients on, a block's input may be kept for a derivative by who calls the block.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not isinstance(scale, nn.Identity) or is_hooked(scale):
        return False
    return may_fuse(tokens, linear.weight, stream)


def add_plain(
    stream: Tokens, tokens: Tensor | Rows8, linear: nn.Module, scale: nn.Module
) -> tuple[Tokens, Tokens]:
    """Leave it to the next norm."""
    return stream, scale(linear(tokens))


def add_fused(
    stream: Tokens, tokens: Tensor, linear: Linear, scale: nn.Module
) -> tuple[Tokens, None]:
    """Have the matmul read and write the stream: rounded once, and the norm has half to read."""
    return add_affine(stream, tokens, linear.weight, linear.steady), None


def gate(
    tokens: Tokens | Rows8, gate_up: nn.Module, activation: Activation, reader: nn.Module
) -> Tensor | Rows8:
    """Return act(gate) * up, the first half of a gated MLP. Shapes: [T, D] -> [T, M].

    Gate and up projection are one matrix, whose rows they have in turns.
    """
    if isinstance(reader, Linear8):
        return STEPS["gate"][choose_8(gate_up, reader)](tokens, gate_up, activation, reader)
    way: Way
    if activation == "silu" and isinstance(tokens, Tensor):
        way = choose(tokens, *gate_up.parameters())
        way = way if way != "fused" or can_gate(tokens, gate_up) else "apart"
    else:
        way = "plain"
    return STEPS["gate"][way](tokens, gate_up, activation)


def can_gate(tokens: Tensor, gate_up: nn.Module) -> bool:
    """Return whether SwiGLU can be the matmul's epilogue: on Hopper, where it was measured."""
    if not is_plain(gate_up) or gate_up.out_features % 16 or gate_up.in_features % 8:
        return False
    return is_hopper(tokens.device)


def choose_8(first: nn.Module, reader: Linear8) -> Way:
    """Return how the first half of an MLP runs that is read in 8 bits."""
    pair = type(first) is Rise8 and reader.channels is not None
    return "fused8" if pair and not is_hooked(first) else "float8"


def in_turns(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up of columns that they have in turns. Shapes: [T, 2 M] -> [T, M] twice.

    Copied apart: passes over every second number take a CPU twice as long.
    """
    halves = gate_up.unflatten(-1, (-1, 2)).movedim(-1, 0)
    gates, up = halves.clone(memory_format=torch.contiguous_format).unbind()
    return gates, up


def gate_plain(tokens: Tokens, gate_up: nn.Module, activation: Activation) -> Tensor:
    """A matmul, and passes over memory."""
    gates, up = in_turns(gate_up(tokens))
    return ACTIVATIONS[activation](gates) * up


def gate_apart(tokens: Tokens, gate_up: nn.Module, activation: Activation) -> Tensor:
    """A matmul, and SwiGLU in one pass."""
    from packvit.fast.kernels.gates import silu_times

    return silu_times(gate_up(tokens))


def gate_fused(tokens: Tokens, gate_up: Linear, activation: Activation) -> Tensor:
    """SwiGLU in the matmul's epilogue: neither gate nor up is written to memory."""
    from packvit.fast.kernels.matmuls import swiglu

    return swiglu(tokens, gate_up.weight, gate_up.bias)


def gate_taught(tokens: Tokens, gate_up: nn.Module, activation: Activation) -> Tensor:
    """A matmul, and SwiGLU in one pass, forward and back."""
    return SiluTimes.apply(gate_up(tokens))


def gate_8(
    tokens: Tokens | Rows8, gate_up: nn.Module, activation: Activation, reader: Linear8
) -> Rows8:
    """A matmul and a pass, to 8 bits without being rounded to 16 again."""
    return activate_8(gate_up(tokens), activation, True, reader)


def activate_8(hidden: Tensor, activation: Activation, gated: bool, reader: Linear8) -> Rows8:
    """Return what the second matrix of an MLP reads, divided by its channels if it has any."""
    from packvit.fast.kernels.eight import activate_8 as kernel

    return Rows8(*kernel(hidden, activation, gated, reader.channels))


def matmul_8(
    tokens: Tokens | Rows8, first: Rise8, activation: Activation, reader: Linear8
) -> Rows8:
    """The activation in the matmul's epilogue; results are divided by the reader's channels."""
    from packvit.fast.kernels.matmuls import rise_8 as kernel

    values, scale, after = first.rows(tokens)
    assert after is not None
    assert reader.channels is not None
    made = kernel(
        values,
        scale,
        first.weight,
        first.scale,
        first.bias,
        after,
        reader.channels,
        activation,
        first.reach.gated,
    )
    return Rows8(made, after)


def rise(
    tokens: Tokens | Rows8, up: nn.Module, activation: Activation, reader: nn.Module
) -> Tensor | Rows8:
    """Return act(up(tokens)), the first half of an MLP. Shapes: [T, D] -> [T, M]."""
    if isinstance(reader, Linear8):
        return STEPS["rise"][choose_8(up, reader)](tokens, up, activation, reader)
    return STEPS["rise"][choose_rise(tokens, up, activation)](tokens, up, activation)


def choose_rise(tokens: Tokens | Rows8, up: nn.Module, activation: Activation) -> Way:
    """Return how a matmul and its activation run; the matmul has an epilogue for one of them."""
    if not (isinstance(tokens, Tensor) and is_plain(up)) or up.steady or up.bias is None:
        return "plain"
    if choose(tokens, up.weight, up.bias) == "taught":
        return "taught"
    fits = activation == "gelu_tanh" and may_fuse(tokens, up.weight, up.bias)
    return "fused" if fits else "plain"


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


def rise_taught(tokens: Tokens, up: Linear, activation: Activation) -> Tensor:
    """A matmul and a pass, and back a pass that has the gradient of the bias too."""
    return Rise.apply(tokens, up.weight, up.bias, activation, ACTIVATIONS[activation])


def rise_8(tokens: Tokens | Rows8, up: nn.Module, activation: Activation, reader: Linear8) -> Rows8:
    """A matmul and a pass, to 8 bits without being rounded to 16 again."""
    return activate_8(up(tokens), activation, False, reader)


STEPS: dict[str, dict[Way, Callable]] = {
    "add": {"plain": add_plain, "fused": add_fused},
    "add_norm": {
        "plain": add_norm_plain,
        "fused": add_norm_fused,
        "taught": add_norm_taught,
        "float8": add_norm_8,
    },
    "gate": {
        "plain": gate_plain,
        "apart": gate_apart,
        "fused": gate_fused,
        "taught": gate_taught,
        "float8": gate_8,
        "fused8": matmul_8,
    },
    "rise": {
        "plain": rise_plain,
        "fused": rise_fused,
        "taught": rise_taught,
        "float8": rise_8,
        "fused8": matmul_8,
    },
}
