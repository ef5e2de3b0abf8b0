"""The plain model's steps, which fused ones are compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.config import Activation
from packvit.fast import steps
from packvit.fast.fp8 import QuantizedRows
from packvit.model.activations import ACTIVATIONS
from packvit.model.layers import split_gate_up
from packvit.model.norms import RMSNorm

add_norm: Any = steps.add_norm  # whose second result is as its reader wants it


def swiglu(gate_up: Tensor) -> Tensor:
    gates, up = split_gate_up(gate_up)
    return F.silu(gates) * up


def norms(width: int, device: str, dtype: torch.dtype) -> list[RMSNorm | nn.LayerNorm]:
    made = [RMSNorm(width, 1e-5), nn.LayerNorm(width, 1e-6)]
    for norm in made:
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return [norm.to(device, dtype) for norm in made]


def stands_for(rows: QuantizedRows) -> Tensor:
    return rows.values.double() * rows.scale.double()


def made_of(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gates, up = split_gate_up(hidden)
    return ACTIVATIONS[activation](gates) * up
