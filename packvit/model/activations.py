"""The activations that encoders are built with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from packvit.config import Activation


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU. Source: CLIP, model.py."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


# Numbers, a multiple of every vector's, and few enough that torch leaves them to one thread.
# Source: torch 2.13, ATen/TensorIterator.h: GRAIN_SIZE is 32,768.
PIECE = 16384

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


def activate(x: Tensor, activation: Activation, invariant: bool) -> Tensor:
    """Return act(x); if `invariant`, a row's bits do not depend on other rows or on threads."""
    if x.is_cuda or not invariant:
        return ACTIVATIONS[activation](x)
    return in_pieces(ACTIVATIONS[activation], x)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), computed on pieces of one size.

    On a CPU torch computes what is left over behind the last whole vector by other formulas, and
    where that lies depends on how many numbers there are and how threads share them.
    """
    pieces = list(x.flatten().split(PIECE))
    if missing := -x.numel() % PIECE:
        pieces[-1] = F.pad(pieces[-1], (0, missing))
    return torch.cat([function(piece) for piece in pieces])[: x.numel()].view(x.shape)
