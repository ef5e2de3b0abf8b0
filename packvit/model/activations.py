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


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}
