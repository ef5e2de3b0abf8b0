"""Matrices in 8 bits, and tokens scaled row by row to meet them. For inference on Hopper and newer.

The second matrix of an MLP reads in 8 bits what the first one and the activation make. On Hopper it
gets there within the first matmul, which needs a scale before the numbers are known: `OutputBound`
says how large they can become.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from packvit.config import Activation
from packvit.fast.hooks import is_hooked
from packvit.model.capability import HOPPER, capability
from packvit.model.layers import Blocks, GatedMLP
from packvit.model.linear import KeylessBiasLinear, Linear

LARGEST = 448.0  # of float8_e4m3fn
# Left above what numbers can reach. Tokens in 8 bits are at most 1/16 longer than they were, which
# counts twice where two products are multiplied, and fast sums round: 1.13 and a little. Numbers
# far below the largest of their row may double; what they then lift above 448 becomes 448.
HEADROOM = 1.2
# Where gate and up are multiplied the bound is too large by the width, and beyond this the low end
# of 8 bits is too near. It saves less there too: matmuls grow, and the pass does not.
WIDEST_GATED = 1536


class QuantizedRows(NamedTuple):
    """Tokens in 8 bits, each scaled by itself: values * scale is what they stand for."""

    values: Tensor  # [T, D] float8_e4m3fn
    scale: Float[Tensor, "T 1"]
    output_scale: Float[Tensor, "T 1"] | None = None  # of what an MLP makes of them: `OutputBound`


def quantize(tokens: Tensor) -> QuantizedRows:
    """Return every row scaled so that its largest magnitude is the largest of 8 bits.

    For weights, and the reference implementation of `kernels.fp8.quantize_fp8`. Numbers of 8 bits
    keep 3 bits of mantissa down to 1 / 28,672 of a row's largest, which is why an outlier channel
    does not drown its row as it would in integers.
    """
    values = tokens.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return QuantizedRows((values / scale).to(torch.float8_e4m3fn), scale)


class LinearFp8(nn.Module):
    """A linear layer in 8 bits: weights scaled output by output, tokens row by row.

    `channels` are factors on the columns of its weight: rows in 8 bits that it reads were divided
    by them, and tokens it divides itself.

    Shapes: channels [D].
    Source: the row-wise recipe of torch's own scaled matmul (`torch._scaled_mm`).
    """

    def __init__(self, linear: nn.Linear, channels: Tensor | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        weight, scale, _ = quantize(weight if channels is None else weight * channels)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        bias = linear.whole_bias() if isinstance(linear, KeylessBiasLinear) else linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("channels", channels)
        self.channels: Tensor | None
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, tokens: Tensor | QuantizedRows) -> Tensor:
        """Return tokens @ weight.T + bias in bfloat16. Shapes: [T, D] -> [T, features]."""
        values, scale, _ = self.rows(tokens)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] # its only name
            values,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def rows(self, tokens: Tensor | QuantizedRows) -> QuantizedRows:
        """Return tokens in 8 bits, and with scales of what comes after if this asks for them."""
        if isinstance(tokens, QuantizedRows):
            return tokens
        from packvit.fast.kernels.fp8 import quantize_fp8

        if self.channels is not None:
            tokens = tokens.float() / self.channels
        return QuantizedRows(*quantize_fp8(tokens, *self.bound_arguments))

    @property
    def bound_arguments(self) -> tuple[Tensor | None, bool]:
        """What `kernels.norms.add_norm_fp8` takes: the bound's weights, whether it is squared."""
        return None, False


class OutputBound(nn.Module):
    """How large act(u), or act(g) * u where `gated`, can become, u and g being rows of weight @ x.

    By Cauchy and Schwarz |w . x| <= ‖w / r‖ ‖r * x‖ for any r > 0, and no activation of ours
    enlarges a magnitude. With r the root mean square of the weight's columns ‖r * x‖ is what
    products come to on average, whatever channels stand out in x or in the weight, so that the
    bound is too large by about sqrt(D), or D where `gated`. Floating point numbers lose no bits by
    that as long as they stay within its range, of 28,672 in all. They leave it where tokens share a
    direction that is no channel, and that the matrix does not read: docs/numerics.md has figures.

    ‖r * x‖ is for a row of tokens, which its norm works out on the way; ‖w / r‖ is for a channel,
    and is put into the weight of the matrix that reads it. A bias is a channel of x that is 1.

    Shapes: weights [D + 1], r and the bias's, so that they give scales; channels [M].
    """

    def __init__(self, linear: LinearFp8, gated: bool) -> None:
        super().__init__()
        whole = linear.weight.float() * linear.scale.T
        bias = whole.new_zeros(len(whole)) if linear.bias is None else linear.bias.float()
        whole = torch.cat([whole, bias[:, None]], dim=1)
        weights = whole.square().mean(0).sqrt()
        weights = weights.clamp(min=weights.max().item() * 1e-6 + 1e-12)  # columns may be zeros
        channels = (whole / weights).norm(dim=1).clamp(min=1e-12)
        self.gated = gated
        room = HEADROOM / LARGEST
        self.register_buffer("weights", weights * (room**0.5 if gated else room))
        self.register_buffer(
            "channels", channels.unflatten(0, (-1, 2)).prod(1) if gated else channels
        )
        self.weights: Tensor
        self.channels: Tensor

    def scales(self, tokens: Tensor) -> Float[Tensor, "T 1"]:
        """Return the scale of each row of what is made of tokens [T, D], divided by `channels`.

        The reference implementation of what `kernels.norms.add_norm_fp8` and
        `kernels.fp8.quantize_fp8` give.
        """
        lengths = (tokens.float() * self.weights[:-1]).square().sum(1, keepdim=True)
        lengths = lengths + self.weights[-1].square()
        return (lengths if self.gated else lengths.sqrt()).clamp(min=1e-12)


class LinearActFp8(LinearFp8):
    """An MLP's first matrix in 8 bits, whose activation leaves the matmul in 8 bits too.

    Its own forward is that of any matrix in 8 bits; `linear_act_fp8` uses its bound.
    """

    def __init__(self, linear: nn.Linear, gated: bool) -> None:
        super().__init__(linear)
        self.bound = OutputBound(self, gated)

    @property
    def bound_arguments(self) -> tuple[Tensor | None, bool]:
        """What `kernels.norms.add_norm_fp8` takes of the bound."""
        return self.bound.weights, self.bound.gated


def linear_act_fp8(
    tokens: Tensor | QuantizedRows,
    first: nn.Module,
    activation: Activation,
    gated: bool,
    second: LinearFp8,
) -> QuantizedRows:
    """Return what an MLP's second matrix reads: act(first(tokens)), in 8 bits.

    The activation is in the matmul's epilogue where both matrices were made for that, and nothing
    watches the first; else it is a pass of its own.
    """
    if type(first) is LinearActFp8 and second.channels is not None and not is_hooked(first):
        from packvit.fast.kernels.matmuls import linear_act_fp8 as kernel

        values, scale, output_scale = first.rows(tokens)
        assert output_scale is not None
        made = kernel(
            values,
            scale,
            first.weight,
            first.scale,
            first.bias,
            output_scale,
            second.channels,
            activation,
            gated,
        )
        return QuantizedRows(made, output_scale)
    from packvit.fast.kernels.fp8 import activate_fp8

    return QuantizedRows(*activate_fp8(first(tokens), activation, gated, second.channels))


def to_fp8(blocks: Blocks) -> None:
    """Put the blocks' matrices in 8 bits, for good, but for attention's output projection.

    That is small, and more exact in 16; where it has no bias its matmul then adds to the stream,
    which costs less than 8 bits save.

    Raises: ValueError where 8 bits cannot run.
    """
    weight = next(blocks.parameters())
    if reason := fp8_obstacle(blocks, weight.device, weight.dtype):
        raise ValueError(f"fp8=True cannot run: fp8 {reason}. Leave it out.")
    for block in blocks.blocks():
        qkv = block.attention.qkv
        assert isinstance(qkv, Linear)
        block.attention.qkv = LinearFp8(qkv)
        mlp = block.mlp
        if isinstance(mlp, GatedMLP):
            mlp.gate_up, mlp.down = mlp_to_fp8(mlp.gate_up, mlp.down, gated=True)
        else:
            mlp.up, mlp.down = mlp_to_fp8(mlp.up, mlp.down, gated=False)


def mlp_to_fp8(first: nn.Module, second: nn.Module, *, gated: bool) -> tuple[LinearFp8, LinearFp8]:
    """Return an MLP's two matrices in 8 bits."""
    assert isinstance(first, Linear)
    assert isinstance(second, Linear)
    narrow = not gated or first.in_features <= WIDEST_GATED
    if not (narrow and is_hopper(first.weight.device)):  # where its kernel was measured
        return LinearFp8(first), LinearFp8(second)
    bounded = LinearActFp8(first, gated)
    return bounded, LinearFp8(second, bounded.bound.channels)


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a CUDA device is of compute capability 9.0, which our matmuls were made on."""
    return capability(device) == HOPPER


def fp8_obstacle(module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the matrices of `module` cannot be of 8 bits, or None; completes "fp8 ..."."""
    if device.type != "cuda":
        return f"needs a CUDA device and the encoder is on {device}"
    found = capability(device)
    if found is not None and found < HOPPER:
        return f"needs compute capability 9.0 and {device} is older"
    if found is not None and found[0] > HOPPER[0] + 1:
        return f"was made for compute capability 9.x and 10.x and {device} is newer"
    if dtype != torch.bfloat16:
        return f"computes beside bfloat16 and the encoder is in {dtype}"
    for layer in module.modules():
        if isinstance(layer, Linear) and (layer.in_features % 16 or layer.out_features % 16):
            return (
                "needs matrices whose sides are divisible by 16 and this encoder has one of "
                f"{layer.out_features} x {layer.in_features}"
            )
    return None
