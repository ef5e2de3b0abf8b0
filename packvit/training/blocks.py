"""What becomes of an encoder's blocks when it is trained: frozen, checkpointed, adapted.

Nothing is wrapped, so the names of parameters, and with them checkpoints, stay what they were.
"""

from torch import nn

from packvit.encoder import Encoder


def checkpoint_activations(encoder: Encoder) -> None:
    """Let every block keep its inputs alone and recompute the rest, which costs a forward more.

    Dropout that an adapter brings is drawn again as it was. A block that is compiled is compiled
    within its checkpoint. Before `shard`.
    """
    for block in encoder.encoder.blocks():
        block.recomputed = True


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

    Whole names, so that nothing outside the blocks is meant, such as a pooling head.
    """
    layers = encoder.encoder.layers
    return [
        f"encoder.layers.{number}.{name}"
        for number, block in enumerate(layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
