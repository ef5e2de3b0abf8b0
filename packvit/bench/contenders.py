"""Contenders: calls that together return every token of a pack, in any layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from packvit.bench.models import Model
from packvit.bench.workloads import Workload
from packvit.config import PatchOrder


class Unavailable(Exception):
    """A contender cannot take part, for the reason given."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One workload and one model: what every contender runs on."""

    model: Model
    workload: Workload
    patches: Tensor  # [T, P], normalised, on the device and in the dtype
    compiled: bool  # whether to wait for torch.compile
    train: bool
    # What all start from, if not from patches, which are cut within the time. Shapes: [N, 3, H, W].
    pixels: Tensor | None = None
    timm: str = ""  # timm's name of the same architecture, where `pixels` are given

    @cached_property
    def images(self) -> Sequence[Tensor]:
        """The patches of each image."""
        return self.patches.split(self.workload.lengths)

    @cached_property
    def grid_thw(self) -> Tensor:
        """The pack's grid, on the host."""
        return torch.tensor(self.workload.grid, dtype=torch.int64, device="cpu")

    @cached_property
    def rows(self) -> Sequence[Tensor]:
        """The rows of the pack of each image."""
        total = torch.arange(len(self.patches), dtype=torch.int64, device=self.patches.device)
        return total.split(self.workload.lengths)


def cut(pixels: Tensor, patch: int, order: PatchOrder) -> Tensor:
    """Return the flattened patches of images of one size, as convolutions leave out what is over.

    Shapes: [N, 3, H, W] -> [T, P].
    """
    height, width = (side // patch * patch for side in pixels.shape[2:])
    pixels = pixels[..., :height, :width]
    tiles = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [N, 3, r, p, c, p]
    inside = (3, 5, 1) if order == "hwc" else (1, 3, 5)
    return tiles.permute(0, 2, 4, *inside).reshape(-1, 3 * patch * patch)


class Call(NamedTuple):
    """One forward of one or more images. Shapes: tokens [..., D], rows [...] int64."""

    run: Callable[[], Tensor]
    rows: Tensor  # the row of the pack of each token, or -1 for padding and prefixes


class Contender(NamedTuple):
    """One way to encode the pack."""

    calls: Sequence[Call]
    module: nn.Module  # the model with the weights


def collect(contender: Contender, tokens: int) -> Tensor:
    """Return the tokens of the whole pack in order. Shapes: -> [T, D]."""
    found, pack = 0, torch.empty(0, dtype=torch.float32, device="cpu")
    for run, rows in contender.calls:
        out = run().detach()
        if not found:
            pack = out.new_full((tokens, out.shape[-1]), torch.nan)
        real = rows >= 0
        pack[rows[real]] = out[real]
        found += int(real.sum())
    assert found == tokens, f"{found} tokens of {tokens}"
    return pack


def forward(contender: Contender) -> Callable[[], None]:
    """Return a function that runs one forward of the pack."""

    def run() -> None:
        for call in contender.calls:
            call.run()

    return run


def forward_backward(contender: Contender, cotangent: Tensor) -> Callable[[], None]:
    """Return a function that runs a forward and the backward of sum(tokens * cotangent).

    Images that are run one by one also run their backward one by one, which takes the least memory.

    Raises: Unavailable if the tokens have no gradient function.
    """
    weights = [  # zero for padding and prefixes
        cotangent[rows.clamp(min=0)] * (rows >= 0)[..., None] for _, rows in contender.calls
    ]

    def run() -> None:
        contender.module.zero_grad(set_to_none=True)
        for call, weight in zip(contender.calls, weights, strict=True):
            out = call.run()
            if not out.requires_grad:
                raise Unavailable("it is for inference only: its tokens have no gradient function")
            out.backward(weight)

    return run


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a contender's weights."""
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
