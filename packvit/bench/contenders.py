"""What a contender is: calls that together give every token of a pack, whatever their layout."""

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
    """One workload for one model: what every contender is given."""

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
        """Which rows of the pack each image is."""
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
    rows: Tensor  # which row of the pack each token is, or -1 where it is none: padding, prefixes


class Contender(NamedTuple):
    """One way to encode the pack."""

    calls: Sequence[Call]
    module: nn.Module  # whose weights it takes


def collect(contender: Contender, tokens: int) -> Tensor:
    """Return the tokens of the whole pack, image after image. Shapes: -> [T, D]."""
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
    """Return one forward of the pack as something to time."""

    def run() -> None:
        for call in contender.calls:
            call.run()

    return run


def forward_backward(contender: Contender, cotangent: Tensor) -> Callable[[], None]:
    """Return a forward, and the gradients of sum(tokens * cotangent), as something to time.

    Images that are forwarded apart are taught apart too, which takes the least memory.

    Raises: Unavailable if the tokens know no derivative.
    """
    weights = [  # zero where a token is none
        cotangent[rows.clamp(min=0)] * (rows >= 0)[..., None] for _, rows in contender.calls
    ]

    def run() -> None:
        contender.module.zero_grad(set_to_none=True)
        for call, weight in zip(contender.calls, weights, strict=True):
            out = call.run()
            if not out.requires_grad:
                raise Unavailable("it is for inference alone: its tokens know no derivative")
            out.backward(weight)

    return run


def weight_bytes(module: nn.Module) -> int:
    """Return what a contender's weights take, in bytes."""
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
