"""Linear layers, as they are or on fixed numbers of rows.

Libraries choose a matmul's kernel by its number of rows, so the same token may come out with other
bits in a larger pack. `make_invariant` prevents that. In 16 bits on CUDA only few rows are split
along the sum (split-K), so a floor on the rows is enough, which the needle tests hold us to;
elsewhere every matmul is given the same number of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 2048  # rows on CUDA: one matmul of AIMv2-large's smallest matrix fills an H100
ROWS = 256  # of every matmul on a CPU
# Numbers of 16 bits that CUDA's fast matmuls read at once: widths are padded to a multiple. For
# patches of 14 x 14 pixels, 588 numbers, zeros at the end save three quarters of the time.
WORDS = 8


class Linear(nn.Linear):
    """A linear layer; if `invariant`, a row's bits do not depend on the number of rows."""

    invariant: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias. Shapes: [T, D] -> [T, features]."""
        return affine(input, self.weight, self.bias, self.invariant)


class KeylessBiasLinear(Linear):
    """q, k and v in one matrix, where keys have no bias.

    Shapes: qv_bias [2 D]: the queries' and the values'.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.qv_bias = nn.Parameter(torch.zeros(2 * width))

    def forward(self, input: Tensor) -> Tensor:
        """Return queries, keys and values side by side. Shapes: [T, D] -> [T, 3 D]."""
        return affine(input, self.weight, self.whole_bias(), self.invariant)

    def whole_bias(self) -> Tensor:
        """Return the bias with zeros for keys. Shapes: [3 D]."""
        query, value = self.qv_bias.chunk(2)
        return torch.cat([query, torch.zeros_like(query), value])


def affine(tokens: Tensor, weight: Tensor, bias: Tensor | None, invariant: bool) -> Tensor:
    """Return tokens @ weight.T + bias; if `invariant`, a row's bits do not depend on others."""
    if tokens.is_cuda and tokens.dtype.itemsize == 2:
        tokens, weight = in_words(tokens), in_words(weight)
    if not invariant or tokens.ndim != 2:
        return F.linear(tokens, weight, bias)
    if tokens.is_cuda and tokens.dtype != torch.float32:
        return F.linear(fill(tokens, max(FLOOR, len(tokens))), weight, bias)[: len(tokens)]
    rows = FLOOR if tokens.is_cuda else ROWS
    filled = fill(tokens, -(-len(tokens) // rows) * rows)
    parts = [F.linear(part, weight, bias) for part in filled.split(rows)]
    return torch.cat(parts)[: len(tokens)]


def in_words(matrix: Tensor) -> Tensor:
    """Return a matrix with zeros behind its columns, so that they are a multiple of `WORDS`."""
    missing = -matrix.shape[-1] % WORDS
    return F.pad(matrix, (0, missing)) if missing else matrix


def fill(tokens: Tensor, rows: int) -> Tensor:
    """Fill up with zeros. Shapes: [T, D] -> [rows, D]."""
    missing = rows - len(tokens)
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def make_invariant(module: nn.Module) -> None:
    """Make every layer of `module` give a row the same bits whatever rows are beside it."""
    for layer in module.modules():
        if hasattr(type(layer), "invariant"):
            setattr(layer, "invariant", True)  # noqa: B010 # which of them have it, their classes say
