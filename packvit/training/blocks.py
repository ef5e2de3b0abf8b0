"""What becomes of an encoder's blocks when it is trained: frozen, checkpointed, adapted.

Nothing is wrapped, so the names of parameters, and with them checkpoints, stay what they were.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from packvit.encoder import Encoder
from packvit.model.attention import Backend
from packvit.model.layers import Block, Tokens, Turns
from packvit.packs.segments import Segments


class CheckpointedBlock(Block):
    """A block that keeps its inputs alone, and runs again when its gradient is asked for.

    Compiled is what runs again, not the checkpoint around it: the compiler, which must not trace
    attention (`opaque`), would leave a checkpoint with attention in it uncompiled, and say nothing.
    """

    compiled: Callable | None = None

    def forward(
        self,
        stream: Tokens,
        delta: Tokens | None,
        segments: Segments,
        turns: Turns | None,
        backend: Backend,
    ) -> tuple[Tokens, Tokens | None]:
        """Return the residual stream, and what is yet to be added to it, if anything is."""
        run = self.compiled or super().forward
        return checkpoint(run, stream, delta, segments, turns, backend, use_reentrant=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Run through torch.compile, which takes all arguments, as `nn.Module.compile` has it."""
        self._compiled_call_impl = None  # of the block as it was before it was checkpointed
        self.compiled = torch.compile(super().forward, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compiled, as `nn.Module` does: it is bound to this block."""
        return {name: x for name, x in super().__getstate__().items() if name != "compiled"}


def checkpoint_activations(encoder: Encoder) -> None:
    """Let every block keep its inputs alone and recompute the rest, which costs a forward more.

    Dropout that an adapter brings is drawn again as it was. Before `shard`.
    """
    for block in encoder.encoder.layers:
        # Its own subclass, not a wrapper: named alike, copied and pickled like any other.
        if type(block) is Block:
            block.__class__ = CheckpointedBlock
            if encoder.compiled:
                block.compile(dynamic=True)


def freeze(encoder: Encoder, blocks: int | None = None) -> None:
    """Keep the embeddings and the first `blocks` blocks as they are; None keeps the whole encoder.

    What is frozen from the front builds no graph and keeps no activations.

    Raises: ValueError for more blocks than there are.
    """
    if blocks is None:
        encoder.requires_grad_(False)
        return
    if not 0 <= blocks <= encoder.config.layers:
        raise ValueError(
            f"blocks is {blocks}, but this encoder has {encoder.config.layers}. None freezes all "
            "of it, heads too."
        )
    encoder.embeddings.requires_grad_(False)
    for block in encoder.encoder.layers[:blocks]:
        block.requires_grad_(False)


def block_linears(encoder: Encoder) -> list[str]:
    """Name every linear layer of every block: the `target_modules` of a peft LoraConfig.

    Whole names, so that nothing outside the blocks is meant: a pooling head reads its weights in
    slices, past an adapter.
    """
    layers = encoder.encoder.layers
    return [
        f"encoder.layers.{number}.{name}"
        for number, block in enumerate(layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
