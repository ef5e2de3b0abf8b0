"""Parameters as they are before training."""

import torch
from torch import nn


def drawn(*shape: int) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution of standard deviation 0.02.

    On the meta device, where encoders are built that are then loaded, nothing is drawn: torch
    would import its compiler for it, in 1 s.
    """
    parameter = nn.Parameter(torch.empty(shape))
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=0.02)
    return parameter
