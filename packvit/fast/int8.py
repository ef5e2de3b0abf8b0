"""Matrices in int8, and tokens rounded to meet them: what `fp8=True` runs. For inference on Hopper.

A norm rounds what it gives by rows, and the first matmul of an MLP what its activation gives by
tiles of 128 columns: int8's steps are as wide as the largest number of a scale asks for, and an
activation's numbers are of very different sizes. docs/numerics.md has the figures.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch._compile import (
    _disable_dynamo,  # as torch.compiler.disable, which imports the compiler at once: 1.6 s
)

from packvit.config import Activation
from packvit.model.capability import HOPPER, capability
from packvit.model.layers import Blocks, GatedMLP
from packvit.model.linear import KeylessBiasLinear, Linear
from packvit.model.norms import Norm

LARGEST = 127.0
TILE = 128  # columns of a scale; that of `fast/kernels/int8.py`, which needs Triton
APART = 16  # channels that are multiplied in bfloat16: the depth of one instruction
OUTLIER = 3.0  # times the median channel: where one is larger, channels are apart
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
SMALLEST = 1e-6  # of a channel, as a part of the largest: weights and norms may have zeros


class QuantizedRows(NamedTuple):
    """Tokens in int8, each scaled by itself: values * scale, with zeros for the channels apart."""

    values: Int8[Tensor, "T D"]
    scale: Float[Tensor, "T 1"]
    apart: Float[Tensor, "T apart"]  # bfloat16


class QuantizedTiles(NamedTuple):
    """Tokens in int8, with a scale for each 128 columns of each."""

    values: Int8[Tensor, "T M"]
    scales: Float[Tensor, "tiles T"]


def quantize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return every row scaled so that its largest magnitude is 127, and the scale.

    That is NaN where a number is not finite. For weights, and the reference implementation of what
    `kernels.norms.add_norm_int8` does.

    Shapes: [T, D] -> int8 [T, D], float32 [T, 1].
    """
    values = tokens.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    rounded = (values / scale).nan_to_num().round().to(torch.int8)
    return rounded, torch.where(scale.isfinite(), scale, torch.nan)


def quantize_tiles(tokens: Tensor) -> QuantizedTiles:
    """Return every 128 columns of a row scaled so that their largest magnitude is 127.

    The reference implementation of the epilogue of `kernels.matmuls.linear_act_int8`.
    """
    rows, width = tokens.shape
    tiles = F.pad(tokens, (0, -width % TILE)).unflatten(1, (-1, TILE)).flatten(0, 1)
    values, scale = quantize(tiles)
    return QuantizedTiles(
        values.view(rows, -1)[:, :width].contiguous(), scale.view(rows, -1).T.contiguous()
    )


def channels_of(norm: Norm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what to divide a norm's channels by, and which are apart: the largest 16, or none.

    A channel that stands out in the norm would make the steps of its row too wide for the others;
    one that stands out in the weight, the steps of the weight. The norm's channels are divided, and
    the columns of the weight multiplied, so that both are of one size: the root of how large the
    channel is in what they make. Where one still stands out, the largest go apart.

    Shapes: weight [M, D] -> float32 [D], int64 [16 or 0].
    """
    size = norm.weight.detach().float().square()
    if norm.bias is not None:
        size = size + norm.bias.detach().float().square()
    size, column = size.sqrt(), weight.float().square().mean(0).sqrt()
    size, column = (x.clamp(min=SMALLEST * x.max() + 1e-12) for x in (size, column))
    made = size * column
    stands_out = made.max() > OUTLIER * made.median()
    return (size / column).sqrt(), made.topk(APART if stands_out else 0).indices


AnyMatrix = TypeVar("AnyMatrix", bound="MatrixInt8")


class MatrixInt8(nn.Module):
    """A matrix in int8, which `to` moves and never casts: its scales stay float32."""

    def _apply(self: AnyMatrix, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnyMatrix:
        # Integers, which no cast of a module changes.
        return super()._apply(lambda x: fn(x.view(BITS[x.itemsize])).view(x.dtype), recurse)


class LinearInt8(MatrixInt8):
    """A linear layer in int8 that reads a norm: weights scaled by output, tokens by row.

    The norm's channels are divided by `channels`: those that `norm_weight` and `norm_bias` make
    are, and whole tokens it divides itself. The channels `apart`, if any, are multiplied in
    bfloat16; `slots` says which of them a channel is, or -1.

    Shapes: weight [M, D], scale [M], apart_weight [M, 16 or 0], channels, slots, norm_weight,
    norm_bias [D], apart [16 or 0].
    """

    def __init__(self, linear: nn.Linear, norm: Norm) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        channels, apart = channels_of(norm, weight)
        weight = weight * channels
        values, scale = quantize(weight.index_fill(1, apart, 0))
        slots = torch.full_like(channels, -1, dtype=torch.int8)
        slots[apart] = torch.arange(len(apart), dtype=torch.int8, device=slots.device)
        bias = linear.whole_bias() if isinstance(linear, KeylessBiasLinear) else linear.bias
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("apart_weight", weight[:, apart].bfloat16().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("channels", channels)
        self.register_buffer("apart", apart)
        self.register_buffer("slots", slots)
        self.register_buffer("norm_weight", norm.weight.detach().float() / channels)
        shift = None if norm.bias is None else norm.bias.detach().float() / channels
        self.register_buffer("norm_bias", shift)
        self.weight: Tensor
        self.scale: Tensor
        self.apart_weight: Tensor
        self.bias: Tensor | None
        self.channels: Tensor
        self.apart: Tensor
        self.slots: Tensor
        self.norm_weight: Tensor
        self.norm_bias: Tensor | None

    @_disable_dynamo
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Tensor | QuantizedRows
    ) -> Tensor:
        """Return tokens @ weight.T + bias in bfloat16. Shapes: [T, D] -> [T, M]."""
        from packvit.fast.kernels.matmuls import linear_int8

        return linear_int8(*self.rows(tokens), *self.matrices)

    def act(
        self, tokens: Tensor | QuantizedRows, activation: Activation, gated: bool
    ) -> QuantizedTiles:
        """Return act(self(tokens)), or act(gate) * up of the two in turns, in int8.

        Its reference implementation is `quantize_tiles` of that.
        """
        from packvit.fast.kernels.matmuls import linear_act_int8

        made = linear_act_int8(*self.rows(tokens), *self.matrices, activation, gated)
        return QuantizedTiles(*made)

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What kernels take of it."""
        return self.weight, self.scale, self.apart_weight, self.bias

    def rows(self, tokens: Tensor | QuantizedRows) -> QuantizedRows:
        """Return tokens in int8."""
        if isinstance(tokens, QuantizedRows):
            return tokens
        tokens = tokens / self.channels
        apart = tokens[:, self.apart].bfloat16()
        return QuantizedRows(*quantize(tokens.index_fill(1, self.apart, 0)), apart)


class TiledLinearInt8(MatrixInt8):
    """An MLP's second matrix in int8, which reads tokens with a scale for each 128 columns.

    Shapes: weight [D, M], scale, bias [D].
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    @_disable_dynamo
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Tensor | QuantizedTiles
    ) -> Tensor:
        """Return tokens @ weight.T + bias in bfloat16. Shapes: [T, M] -> [T, D]."""
        values = tokens.values if isinstance(tokens, QuantizedTiles) else tokens
        zeros = self.scale.new_zeros(len(values), len(self.weight), dtype=torch.bfloat16)
        return self.add_(zeros, tokens, None)

    def add_(
        self, stream: Tensor, tokens: Tensor | QuantizedTiles, factor: Tensor | None
    ) -> Tensor:
        """Return stream + factor * self(tokens), written where `stream` is, and rounded once."""
        from packvit.fast.kernels.int8 import add_tiles_

        tiles = tokens if isinstance(tokens, QuantizedTiles) else quantize_tiles(tokens)
        return add_tiles_(stream, *tiles, self.weight, self.scale, self.bias, factor)


def to_int8(blocks: Blocks) -> None:
    """Put the blocks' matrices in int8, for good, but for attention's output projection.

    That is small, and more exact in 16; where it has no bias its matmul then adds to the stream,
    which costs less than 8 bits save.

    Raises: ValueError where int8 cannot run.
    """
    weight = next(blocks.parameters())
    if reason := int8_obstacle(blocks, weight.device, weight.dtype):
        raise ValueError(f"fp8=True cannot run: fp8 {reason}. Leave it out.")
    for block in blocks.blocks():
        attention, mlp = block.attention, block.mlp
        attention.qkv = read_norm(attention.qkv, block.attention_norm)
        if isinstance(mlp, GatedMLP):
            mlp.gate_up = read_norm(mlp.gate_up, block.mlp_norm)
        else:
            mlp.up = read_norm(mlp.up, block.mlp_norm)
        assert isinstance(mlp.down, Linear)
        mlp.down = TiledLinearInt8(mlp.down)


def read_norm(linear: nn.Module, norm: Norm) -> LinearInt8:
    """Return a matrix in int8 that reads what `norm` gives."""
    assert isinstance(linear, Linear)
    return LinearInt8(linear, norm)


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a CUDA device is of compute capability 9.0, which our matmuls were made on."""
    return capability(device) == HOPPER


def int8_obstacle(module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the matrices of `module` cannot be in int8, or None; completes "fp8 ..."."""
    if device.type != "cuda":
        return f"needs a CUDA device and the encoder is on {device}"
    if capability(device) not in (None, HOPPER):
        return f"was made for compute capability 9.0 and {device} is of another"
    if dtype != torch.bfloat16:
        return f"computes beside bfloat16 and the encoder is in {dtype}"
    for layer in module.modules():
        if isinstance(layer, Linear) and (layer.in_features % 16 or layer.out_features % 16):
            return (
                "needs matrices whose sides are divisible by 16 and this encoder has one of "
                f"{layer.out_features} x {layer.in_features}"
            )
    return None
