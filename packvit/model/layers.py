"""The modules that encoders are made of. Each takes a pack and its `Segments` as arguments.

Weights that read the same input are one matrix: q, k and v, and an MLP's gate and up projection.
A checkpoint that keeps them apart is fused as it is loaded (`weights.py`).
"""

from collections.abc import Collection
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from packvit.config import Activation, EncoderConfig, Rotary, SinCos, Statistics, Table
from packvit.fast.fp8 import Linear8, Rows8, to_8
from packvit.fast.steps import Norm, RMSNorm, Tokens, add, add_norm, gate, is_hooked, rise
from packvit.model.attention import Backend
from packvit.model.linear import Linear, affine
from packvit.model.positions import (
    Axes,
    ResizedTables,
    check_grid,
    look_up,
    rotary,
    rotate,
    sine_cosine,
)
from packvit.packs.segments import Grid, PatchPlaces, PrefixPlaces, Segments

AnyModule = TypeVar("AnyModule", bound="PatchEmbeddings")
Turns = tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]]  # rotary cosine and sine of each token


def norm(config: EncoderConfig) -> Norm:
    """Return the norm that `config` names, over the encoder's width."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps)


def to_values(
    patches: UInt8[Tensor, "T P"],
    mean: Statistics,
    std: Statistics,
    *,
    channels_last: bool,
) -> Float[Tensor, "T P"]:
    """Return raw pixels normalised in fp32, to the last bit as transformers' processors do it."""
    # 255 is a tensor too: CUDA multiplies by a host number's reciprocal, which rounds differently.
    numbers = torch.tensor([mean, std, (255.0,) * 3], dtype=torch.float32, device="cpu")
    statistics = numbers.to(patches.device, non_blocking=True)
    center, scale, white = statistics if channels_last else statistics[:, :, None]
    values = patches.unflatten(1, (-1, 3) if channels_last else (3, -1)).float()
    return values.div_(white).sub_(center).div_(scale).flatten(1)


class PatchEmbeddings(nn.Module):
    """Flattened patches to the token stream: one matrix, positions, and prefix tokens.

    A convolution whose stride is its kernel is a linear layer over flattened patches, so nothing
    is ever put back together into images.
    """

    def __init__(self, config: EncoderConfig, *, interpolate: bool = False) -> None:
        super().__init__()
        self.config = config
        self.interpolate = interpolate
        self.patches = Linear(config.patch_dim, config.width, bias=config.patch_bias)
        self.norm = norm(config) if config.embedding_norm else None
        if isinstance(config.positions, Table):
            places = config.positions.rows * config.positions.columns + config.positions.class_row
            self.positions = nn.Parameter(torch.empty(places, config.width).normal_(std=0.02))
            self.resized = ResizedTables(config.positions)
        elif isinstance(config.positions, SinCos):
            self.axes = Axes(config.positions, config.width)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.width).normal_(std=0.02))
        if config.registers:
            shape = (config.registers, config.width)
            self.registers = nn.Parameter(torch.empty(shape).normal_(std=0.02))

    def forward(
        self,
        patches: Float[Tensor, "T P"],
        grid: Grid,
        places: PrefixPlaces | None,
        sines: Tensor | None = None,
    ) -> Float[Tensor, "tokens D"]:
        """Embed the T patches of the images in `grid`, each sequence behind its prefix tokens.

        `sines` are sine-cosine positions [T, D], where they were made beforehand.

        Raises: ValueError for a grid that a learned table was not made for.
        """
        tokens = self.patches(patches)
        if self.norm is not None and self.config.embedding_norm == "patches":
            tokens = self.norm(tokens)
        tokens = self.add_positions(tokens, grid) if sines is None else tokens + sines
        if places is not None:
            tokens = torch.cat([self.prefix(), tokens]).index_select(0, places.gather)
        if self.norm is not None and self.config.embedding_norm == "tokens":
            tokens = self.norm(tokens)
        return tokens

    def train(self: AnyModule, mode: bool = True) -> AnyModule:
        """Switch between training and inference, and forget tables resized before."""
        if isinstance(self.config.positions, Table):
            self.resized.forget()
        return super().train(mode)

    def add_positions(self, tokens: Tokens, grid: Grid) -> Tokens:
        """Add to each patch what tells its place; rotary positions come in later."""
        positions = self.config.positions
        if isinstance(positions, Rotary):
            return tokens
        places = PatchPlaces.from_grid(grid, device=tokens.device)
        if isinstance(positions, SinCos):
            return tokens + sine_cosine(self.axis(grid), places)
        if not (positions.any_grid or self.interpolate):
            check_grid(positions, grid, self.config.patch)
        return tokens + look_up(
            self.resized, self.positions, places, grid, steady=self.patches.steady
        )

    def axis(self, grid: Grid) -> Float[Tensor, "side half"]:
        """Return the sine-cosine axis, as long as the longest frame has patches, at the least.

        So that it serves frames of one row, which is what fills up the pack of a CUDA graph.
        """
        longest = max(rows * columns for _, rows, columns in grid)
        return self.axes.get(longest, self.patches.weight.device, self.patches.weight.dtype)

    def prefix(self) -> Float[Tensor, "R D"]:
        """Return the tokens that open every sequence: class token, then registers."""
        positions, first = self.config.positions, []
        if self.config.class_token:
            has_row = isinstance(positions, Table) and positions.class_row
            first = [self.class_token + self.positions[0] if has_row else self.class_token]
        rest = self.registers if self.config.registers else ()
        return torch.stack([*first, *rest])


class Attention(nn.Module):
    """Every token attends to the tokens of its own sequence."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        bias = config.qkv_bias == "qkv"
        self.qkv: Linear | Linear8 = Linear(config.width, 3 * config.width, bias=bias)
        if config.qkv_bias == "qv":
            self.qv_bias = nn.Parameter(torch.zeros(2 * config.width))
        self.has_qv_bias = config.qkv_bias == "qv"
        self.out = Linear(config.width, config.width, bias=config.bias)

    def forward(
        self,
        hidden_states: Tokens | Rows8,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
    ) -> Tokens:
        """Attend, by `backend`, within `segments`; `turns` are rotary positions."""
        return self.out(self.attend(hidden_states, segments, turns, backend))

    def attend(
        self,
        hidden_states: Tokens | Rows8,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
    ) -> Tokens:
        """Return what `out` reads: what every head found, side by side."""
        heads = self.project(hidden_states).unflatten(-1, (3, self.heads, -1))
        if turns is None and backend.teach and heads.requires_grad and torch.is_grad_enabled():
            return backend.teach(heads, segments).flatten(-2)
        query, key, value = heads.unbind(-3)
        if turns is not None:
            # Under autocast turns are fp32, and so would queries and keys be beside bf16 values.
            query, key = (rotate(heads, *turns).to(value.dtype) for heads in (query, key))
        return backend.run(query, key, value, segments, segments).flatten(-2)

    def project(self, hidden_states: Tokens | Rows8) -> Float[Tensor, "T 3*D"]:
        """Return queries, keys and values side by side."""
        if not self.has_qv_bias:
            return self.qkv(hidden_states)
        query, value = self.qv_bias.chunk(2)
        bias = torch.cat([query, torch.zeros_like(query), value])  # keys have none
        if type(self.qkv) is Linear:
            assert isinstance(hidden_states, Tensor)
            return affine(hidden_states, self.qkv.weight, bias, self.qkv.steady)
        return self.qkv(hidden_states) + bias


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.up: Linear | Linear8 = Linear(config.width, config.mlp_width, bias=config.bias)
        self.down: Linear | Linear8 = Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation: Activation = config.activation

    @property
    def reads(self) -> nn.Module:
        """The first matrix, which decides what it is given."""
        return self.up

    def risen(self, hidden_states: Tokens | Rows8) -> Tensor | Rows8:
        """Return what `down` reads."""
        return rise(hidden_states, self.up, self.activation, self.down)

    def forward(self, hidden_states: Tokens | Rows8) -> Tokens:
        """Transform each token by itself."""
        return self.down(self.risen(hidden_states))

    def to_float8(self) -> None:
        """Put both matrices in 8 bits."""
        self.up, self.down = to_8(self.up, self.down, gated=False)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, where act is SiLU. `gate_up` has their rows in turns."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        wide = 2 * config.mlp_width
        self.gate_up: Linear | Linear8 = Linear(config.width, wide, bias=config.bias)
        self.down: Linear | Linear8 = Linear(config.mlp_width, config.width, bias=config.bias)
        self.activation: Activation = config.activation

    @property
    def reads(self) -> nn.Module:
        """The first matrix, which decides what it is given."""
        return self.gate_up

    def risen(self, hidden_states: Tokens | Rows8) -> Tensor | Rows8:
        """Return what `down` reads."""
        return gate(hidden_states, self.gate_up, self.activation, self.down)

    def forward(self, hidden_states: Tokens | Rows8) -> Tokens:
        """Transform each token by itself."""
        return self.down(self.risen(hidden_states))

    def to_float8(self) -> None:
        """Put both matrices in 8 bits."""
        self.gate_up, self.down = to_8(self.gate_up, self.down, gated=True)


class LayerScale(nn.Module):
    """A learned factor on each channel."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.width))

    def forward(self, hidden_states: Tokens) -> Tokens:
        """Scale each token's channels."""
        return hidden_states * self.scale


class Block(nn.Module):
    """Attention, then an MLP, each on normed tokens and added to the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.attention_scale = LayerScale(config) if config.layer_scale else nn.Identity()
        self.mlp_norm = norm(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.mlp_scale = LayerScale(config) if config.layer_scale else nn.Identity()

    def to_float8(self) -> None:
        """Put the matrices in 8 bits, but for attention's output projection.

        That is small, and more exact in 16; where it has no bias its matmul then adds to the
        stream, which costs less than 8 bits save.
        """
        qkv = self.attention.qkv
        assert isinstance(qkv, Linear)
        self.attention.qkv = Linear8(qkv)
        self.mlp.to_float8()

    def forward(
        self,
        stream: Tokens,
        delta: Tokens | None,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
    ) -> tuple[Tokens, Tokens | None]:
        """Return the residual stream, and what is yet to be added to it, if anything is.

        `delta` is what the block before left to be added: whoever norms next adds it, so that the
        stream is read and written once for both. In inference `stream` may be written to.
        """
        attention, mlp = self.attention, self.mlp
        if is_hooked(self) and not torch.is_grad_enabled():
            stream = stream.clone()  # who watches may keep what the block was given
        stream, normed = add_norm(stream, delta, self.attention_norm, attention.qkv)
        if is_hooked(attention):
            delta = self.attention_scale(attention(normed, segments, turns, backend))
        else:
            stream, delta = add(
                stream,
                attention.attend(normed, segments, turns, backend),  # held by no name: it is large
                attention.out,
                self.attention_scale,
            )
        stream, normed = add_norm(stream, delta, self.mlp_norm, mlp.reads)
        if is_hooked(mlp):
            return stream, self.mlp_scale(mlp(normed))
        return add(stream, mlp.risen(normed), mlp.down, self.mlp_scale)


class Blocks(nn.Module):
    """All blocks, one after another, with the outputs of some of them kept."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))

    def to_float8(self) -> None:
        """Put the blocks' matrices in 8 bits, for good."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.to_float8()

    def forward(
        self,
        hidden_states: Tokens,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
        taps: Collection[int] = (),
    ) -> tuple[Tokens, dict[int, Tokens]]:
        """Return the residual stream after the last block, and after each layer in `taps`."""
        # In inference blocks write to the stream, which so far is the caller's.
        stream = hidden_states
        if stream.is_cuda and not torch.is_grad_enabled():
            stream = stream.clone(memory_format=torch.contiguous_format)
        tapped, delta = {}, None
        for layer, block in enumerate(self.layers):
            stream, delta = block(stream, delta, segments, turns, backend)
            if is_hooked(block) and not torch.is_grad_enabled():
                stream = stream.clone()  # who watches it may keep what it gave
            if layer in taps:
                tapped[layer] = stream.clone() if delta is None else stream + delta
        return stream if delta is None else stream + delta, tapped


def rotary_turns(
    config: EncoderConfig, grid: Grid, places: PrefixPlaces | None, like: Tensor
) -> Turns | None:
    """Return every token's rotary cosine and sine, made once for all layers; prefixes stay as is.

    Shapes: 2 x [tokens, K], on the device and in the dtype of `like`.
    """
    if not isinstance(config.positions, Rotary):
        return None
    on_device = PatchPlaces.from_grid(grid, device=like.device)
    cosine, sine = rotary(config.positions, on_device, config.head_dim, like.dtype)
    if places is None:
        return cosine, sine
    still = cosine.new_zeros(config.prefix, config.head_dim)
    return (
        torch.cat([still + 1, cosine]).index_select(0, places.gather),
        torch.cat([still, sine]).index_select(0, places.gather),
    )
