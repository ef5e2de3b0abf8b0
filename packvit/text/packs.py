"""What a forward of texts takes and gives: ids of tokens laid end to end, and their features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from packvit.config import TextConfig
from packvit.packs.features import image_means
from packvit.packs.grid import to_device
from packvit.packs.segments import Segments


class TextPack(NamedTuple):
    """What one forward takes: `text(pack)`, `text(*pack)` and `text.encode(pack)`.

    Shapes: input_ids [T] int64 on the encoder's device; lengths N host ints, tokens of each text.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TextFeatures:
    """The outputs of a text encoder for a pack of N texts.

    Shapes: tokens [T, D]; pooled [N, D], or the width of the tower's head; projected [N, E], or
    None where images and texts share the space of `pooled`.
    """

    tokens: Tensor
    pooled: Tensor
    projected: Tensor | None
    lengths: tuple[int, ...]

    def vectors(self) -> Tensor:
        """Return one vector a text in fp32, in the space shared with images. Shapes: [N, E]."""
        return (self.pooled if self.projected is None else self.projected).float()


def as_text_pack(input_ids: Tensor | TextPack, lengths: Sequence[int] | None) -> TextPack:
    """Return what a call was given as one pack.

    Raises: TypeError for a pack with other lengths beside it, or ids without them.
    """
    if isinstance(input_ids, TextPack):
        if lengths is not None:
            raise TypeError("A TextPack brings its own lengths. Leave the other ones out.")
        return input_ids
    if lengths is None:
        raise TypeError(
            "lengths is missing, which says how many tokens each text has. Give a TextPack, or "
            "both of its parts: text(pack.input_ids, pack.lengths)."
        )
    return TextPack(input_ids, tuple(lengths))


def pool(
    config: TextConfig, tokens: Tensor, input_ids: Int[Tensor, " T"], segments: Segments
) -> Tensor:
    """Return one row for each text. Shapes: tokens [T, D] -> [N, D]."""
    if config.pool == "mean":
        return image_means(tokens, segments.lengths).to(tokens.dtype)
    return tokens.index_select(0, pooled_places(config, input_ids, segments))


def pooled_places(
    config: TextConfig, input_ids: Int[Tensor, " T"], segments: Segments
) -> Int[Tensor, " N"]:
    """Return which token of the pack is pooled for each text.

    A text without the token asked for has its first one pooled, as in the reference.
    """
    starts, lengths = np.array(segments.starts), np.array(segments.lengths)
    if config.pool == "last":
        return to_device(starts + lengths - 1, input_ids.device)
    device, texts = input_ids.device, len(lengths)
    text = to_device(np.repeat(np.arange(texts), lengths), device)
    ids = input_ids.long()
    if config.pool == "largest":
        most = ids.new_full((texts,), -1).scatter_reduce(0, text, ids, "amax")
        hits = ids == most.index_select(0, text)
    else:
        hits = ids == config.end
    nowhere = len(ids)
    places = torch.where(hits, torch.arange(nowhere, dtype=torch.int64, device=device), nowhere)
    first = ids.new_full((texts,), nowhere).scatter_reduce(0, text, places, "amin")
    return torch.where(first < nowhere, first, to_device(starts, device))
