"""Freeze, checkpoint and adapt the blocks of an encoder for training.

No module is wrapped, so the names of parameters, and so checkpoints, do not change.
"""

from torch import nn

from packvit.encoder import Encoder


def checkpoint_activations(encoder: Encoder) -> None:
    """Make every block keep only its inputs and recompute the rest in backward.

    This costs one more forward. Dropout of an adapter is recomputed with the same random numbers. A
    compiled block is compiled within its checkpoint. Call it before `shard`.
    """
    for block in encoder.encoder.blocks():
        block.recomputed = True


def freeze(encoder: Encoder, blocks: int | None = None) -> None:
    """Freeze the embeddings and the first `blocks` blocks; None freezes the whole encoder.

    Frozen blocks at the front build no graph and keep no activations.

    Raises: ValueError for more blocks than the encoder has.
    """
    if blocks is None:
        encoder.requires_grad_(False)
        return
    if not 0 <= blocks <= encoder.config.layers:
        raise ValueError(
            f"blocks is {blocks}, but this encoder has {encoder.config.layers}. None freezes "
            "the whole encoder, heads included."
        )
    encoder.embeddings.requires_grad_(False)
    for block in encoder.encoder.layers[:blocks]:
        block.requires_grad_(False)


def block_linears(encoder: Encoder) -> list[str]:
    """Return the names of all linear layers of blocks: `target_modules` of a peft LoraConfig.

    Whole names, so that nothing outside the blocks is meant, such as a pooling head.
    """
    layers = encoder.encoder.layers
    return [
        f"encoder.layers.{number}.{name}"
        for number, block in enumerate(layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
