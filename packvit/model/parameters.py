"""Parameters as they are before training."""

import torch
from torch import nn


def drawn(*shape: int) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution of standard deviation 0.02.

    On the meta device, where encoders are built that are then loaded, nothing is drawn: torch
    would import its compiler for it, in 1 s.
    """
    values = torch.empty(shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=0.02))
