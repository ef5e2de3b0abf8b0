"""A vision tower for a multimodal model: an encoder's layers, merged and projected."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from packvit.encoder import Encoder
from packvit.model.merging import Merging
from packvit.packs.checks import count_from_front
from packvit.packs.features import Pack
from packvit.packs.grid import GridLike
from packvit.packs.segments import Segments


@dataclass(frozen=True, eq=False)
class Seen:
    """The output of a tower: M tokens, and the grid of their images."""

    tokens: Float[Tensor, "M width"]
    grid_thw: Tensor  # [N, 3] on the host: frames, rows and columns of merged tokens
    segments: Segments  # every frame is a sequence


class Tower(nn.Module):
    """Concatenates tokens of several layers, merges `side` x `side` patches, and projects them.

    The last layer comes after the encoder's final norm, earlier ones directly from their blocks, so
    the projector starts with a norm. `width` is the width of the language model.
    """

    def __init__(
        self, encoder: Encoder, width: int, *, taps: Sequence[int] = (), side: int = 2
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.side = side
        self.taps = [count_from_front(layer, encoder.config.layers) for layer in taps]
        merged = (1 + len(self.taps)) * side**2 * encoder.config.width
        self.projector = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width)
        ).to(encoder.device, encoder.dtype)

    def forward(self, hidden_states: Tensor | Pack, grid_thw: GridLike | None = None) -> Seen:
        """Return the projected tokens of a pack; it takes what an encoder takes."""
        # `encode` makes its GPU current, and FSDP gathers the weights for it.
        found = self.encoder.encode(hidden_states, grid_thw, taps=self.taps, pooled=False)
        tokens = torch.cat([*(found.taps[layer] for layer in self.taps), found.tokens], -1)
        merging = Merging.from_grid(
            torch.tensor(found.grid, dtype=torch.int64, device="cpu"),
            patches=len(tokens),
            side=self.side,
            device=tokens.device,
        )
        return Seen(self.projector(merging.merge(tokens)), merging.grid_thw, merging.segments)
