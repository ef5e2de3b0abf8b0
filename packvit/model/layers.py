"""Attention, MLP and block, as the papers have them. Each takes a pack and its `Segments`.

Weights that read the same input are one matrix: q, k and v, and an MLP's gate and up projection.
A checkpoint that keeps them apart is fused as it is loaded (`checkpoints/rules.py`). What runs the
same blocks with fewer passes over memory is `fast/blocks.py`.
"""

from collections.abc import Collection, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packvit.config import Activation, TransformerConfig
from packvit.model.activations import activate
from packvit.model.attention import Backend
from packvit.model.embeddings import CosSin
from packvit.model.linear import KeylessBiasLinear, Linear
from packvit.model.norms import Tokens, norm
from packvit.model.rotary import rotate
from packvit.packs.segments import Segments, WindowSegments


class Attention(nn.Module):
    """Every token attends to the tokens of its own sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv: nn.Module = qkv_projection(config)
        self.out = Linear(config.width, config.width, bias=config.bias)

    def forward(
        self, x: Tokens, segments: Segments, rotary: CosSin | None, backend: Backend
    ) -> Tokens:
        """Attend, by `backend`, within `segments`; `rotary` turns queries and keys."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if rotary is not None:
            # Under autocast cosines are fp32, and so would queries and keys be beside bf16 values.
            query, key = (rotate(heads, *rotary).to(value.dtype) for heads in (query, key))
        return self.out(backend.run(query, key, value, segments, segments).flatten(-2))


def qkv_projection(config: TransformerConfig) -> Linear:
    """Return the matrix that makes queries, keys and values, side by side."""
    if config.qkv_bias == "qv":
        return KeylessBiasLinear(config.width)
    return Linear(config.width, 3 * config.width, bias=config.qkv_bias == "qkv")


class MLP(nn.Module):
    """down(act(up(x)))."""

    invariant: bool = False  # see `model/linear.py`

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up: nn.Module = Linear(config.width, config.mlp_width, bias=config.bias)
        self.down: nn.Module = Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation: Activation = config.activation

    def forward(self, x: Tokens) -> Tokens:
        """Transform each token by itself."""
        return self.down(activate(self.up(x), self.activation, self.invariant))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, where act is SiLU.

    Gate and up projection are one matrix, whose rows alternate: gate, up, gate, up.
    """

    invariant: bool = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up: nn.Module = Linear(config.width, 2 * config.mlp_width, bias=config.bias)
        self.down: nn.Module = Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation: Activation = config.activation

    def forward(self, x: Tokens) -> Tokens:
        """Transform each token by itself."""
        gate, up = split_gate_up(self.gate_up(x))
        return self.down(activate(gate, self.activation, self.invariant) * up)


def first_linear(mlp: MLP | GatedMLP) -> nn.Module:
    """Return the matrix that reads an MLP's input."""
    return mlp.gate_up if isinstance(mlp, GatedMLP) else mlp.up


def split_gate_up(gate_up: Float[Tensor, "T both"]) -> tuple[Tensor, Tensor]:
    """Return the alternating columns of gate and up as two tensors. Shapes: [T, 2 M] -> 2 x [T, M].

    Copied apart: passes over every second number take a CPU twice as long.
    """
    halves = gate_up.unflatten(-1, (-1, 2)).movedim(-1, 0)
    gate, up = halves.clone(memory_format=torch.contiguous_format).unbind()
    return gate, up


class LayerScale(nn.Module):
    """A learned factor on each channel."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tokens) -> Tokens:
        """Scale each token's channels."""
        return x * self.scale


class Block(nn.Module):
    """Attention, then an MLP, each on normed tokens and added to the residual stream."""

    recomputed = False  # its activations, in the backward pass: `training.checkpoint_activations`

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.attention_scale = LayerScale(config) if config.layer_scale else nn.Identity()
        self.mlp_norm = norm(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.mlp_scale = LayerScale(config) if config.layer_scale else nn.Identity()

    def forward(
        self, x: Tokens, segments: Segments, rotary: CosSin | None, backend: Backend
    ) -> Tokens:
        """Return the residual stream with what attention and the MLP add to it."""
        h = self.attention_norm(x)
        x = x + self.attention_scale(self.attention(h, segments, rotary, backend))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class Blocks(nn.Module):
    """All blocks, one after another, with the outputs of some of them kept."""

    invariant: bool = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, from the first to the last."""
        yield from self.layers  # pyright: ignore[reportReturnType] # a ModuleList of any modules

    def forward(
        self,
        x: Tokens,
        segments: Segments,
        rotary: CosSin | None,
        backend: Backend,
        taps: Collection[int] = (),
        windows: WindowSegments | None = None,
    ) -> tuple[Tokens, dict[int, Tokens]]:
        """Return the residual stream after the last block, and after each layer in `taps`."""
        tapped = {}
        for layer, block in enumerate(self.blocks()):
            own = WindowSegments.of_layer(layer, segments, windows)
            if block.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, own, rotary, backend, use_reentrant=False)
            else:
                x = block(x, own, rotary, backend)
            if layer in taps:
                tapped[layer] = x
        return x, tapped
