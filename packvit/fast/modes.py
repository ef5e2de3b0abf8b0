"""The ways to run that a caller chooses when loading: in 8 bits, invariant, compiled."""

from torch import nn

from packvit.config import LoadOptions
from packvit.fast.fp8 import fp8_obstacle, to_fp8
from packvit.model.layers import Blocks
from packvit.model.linear import make_invariant


def switch_on(encoder: nn.Module, blocks: Blocks, options: LoadOptions) -> None:
    """Have an encoder with these blocks run as `options` ask from now on.

    Raises: ValueError for 8 bits that cannot run here.
    """
    if options.fp8:
        weight = next(encoder.parameters())
        if reason := fp8_obstacle(blocks, weight.device, weight.dtype):
            raise ValueError(f"fp8=True cannot run: fp8 {reason}. Leave it out.")
        to_fp8(blocks)
        encoder.requires_grad_(False)
    if options.invariant:
        make_invariant(encoder)
    if options.compile:
        for block in blocks.blocks():
            block.compile(dynamic=True)  # one after another, so that all share one compilation
