"""The plain model's steps, which fused ones are compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packvit.config import Activation
from packvit.fast import steps
from packvit.fast.int8 import LinearInt8, QuantizedRows, QuantizedTiles
from packvit.model.activations import ACTIVATIONS
from packvit.model.layers import split_gate_up
from packvit.model.norms import RMSNorm

EPILOGUES = [name for name in ACTIVATIONS if name != "relu"]  # our kernels have no ReLU

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


def stands_for(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


def rows_stand_for(rows: QuantizedRows, reader: LinearInt8) -> Tensor:
    """Return what a reader's tokens are, divided by its channels as they are."""
    return stands_for(*rows[:2]).index_copy(1, reader.apart, rows.apart.double())


def tiles_stand_for(tiles: QuantizedTiles) -> Tensor:
    spread = tiles.scales.double().repeat_interleave(128, 0)[: tiles.values.shape[1]]
    return tiles.values.double() * spread.T


def rounding(found: Tensor, exact: Tensor) -> float:
    """Return the error of bfloat16 numbers as a multiple of what rounding `exact` costs."""
    error, least = ((x.double() - exact).norm() for x in (found, exact.bfloat16()))
    return (error / least).item()


def made_of(hidden: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gates, up = split_gate_up(hidden)
    return ACTIVATIONS[activation](gates) * up
