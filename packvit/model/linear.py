"""How a matrix meets tokens: as it is, or in steady numbers of rows; in 8 bits: `float8.py`.

Libraries choose a matmul's kernel by its number of rows, so the same token may come out with other
bits in a larger pack. `make_steady` is the way out. In 16 bits on CUDA only few rows are split
along the sum (split-K), so a floor on the rows is enough, which the needle tests hold us to;
elsewhere every matmul is given the same number of rows.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 2048  # rows on CUDA: one matmul of AIMv2-large's smallest matrix fills an H100
ROWS = 256  # of every matmul on a CPU
# Numbers of 16 bits that CUDA's fast matmuls read at once: rows must be so many, or multiples. For
# patches of 14 x 14 pixels, which are 588, zeros behind are the price of a quarter of the time.
WORDS = 8


class Linear(nn.Linear):
    """A linear layer whose rows can be kept from knowing how many others there are."""

    steady: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias. Shapes: [T, D] -> [T, features]."""
        return affine(input, self.weight, self.bias, self.steady)


def affine(tokens: Tensor, weight: Tensor, bias: Tensor | None, steady: bool) -> Tensor:
    """Return tokens @ weight.T + bias, a row's bits not knowing of other rows where `steady`."""
    if tokens.is_cuda and tokens.dtype.itemsize == 2 and tokens.shape[-1] % WORDS:
        tokens, weight = (F.pad(x, (0, -x.shape[-1] % WORDS)) for x in (tokens, weight))
    if not steady or tokens.ndim != 2:
        return F.linear(tokens, weight, bias)
    if tokens.is_cuda and tokens.dtype != torch.float32:
        return F.linear(fill(tokens, max(FLOOR, len(tokens))), weight, bias)[: len(tokens)]
    rows = FLOOR if tokens.is_cuda else ROWS
    filled = fill(tokens, -(-len(tokens) // rows) * rows)
    parts = [F.linear(part, weight, bias) for part in filled.split(rows)]
    return torch.cat(parts)[: len(tokens)]


def add_affine(stream: Tensor, tokens: Tensor, weight: Tensor, steady: bool) -> Tensor:
    """Return stream + tokens @ weight.T in 16 bits, written where `stream` is if it can be.

    Rounded once, from the sums. A row's bits do not know of other rows where `steady`.
    """
    if steady and len(tokens) < FLOOR:
        return torch.addmm(fill(stream, FLOOR), fill(tokens, FLOOR), weight.t())[: len(tokens)]
    return stream.addmm_(tokens, weight.t())


def fill(tokens: Tensor, rows: int) -> Tensor:
    """Fill up with zeros. Shapes: [T, D] -> [rows, D]."""
    missing = rows - len(tokens)
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def make_steady(module: nn.Module) -> None:
    """Let no linear layer of `module` give a row other bits for the rows beside it."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.steady = True


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a CUDA device is of compute capability 9.0, which our matmuls were made on."""
    # Fake tensors, which calls are counted with, need no GPU.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)
