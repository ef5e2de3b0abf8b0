"""What goes into an encoder's forward, and what comes out of it."""

from dataclasses import dataclass

from torch import Tensor

from packvit.packed import Grid


@dataclass(frozen=True, slots=True)
class Pack:
    """What one forward takes.

    Shapes: hidden_states [T, P] uint8 on the encoder's device; grid_thw [N, 3] int64 on the host.
    """

    hidden_states: Tensor
    grid_thw: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What an encoder says about a pack of N images whose frames are S sequences.

    Shapes: tokens [T, D]; prefix [S, R, D]; pooled [S, D] or None where the checkpoint has no
    head; projected [S, E] or None; taps {layer: [T, D]}; segment_image [S] int64.
    """

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor | None
    projected: Tensor | None
    taps: dict[int, Tensor]
    segment_image: Tensor  # which image a row of pooled or prefix belongs to
    grid: Grid

    def per_image(self) -> list[Tensor]:
        """Return the patch tokens of each image: N views [frames, rows, columns, D]."""
        parts = self.tokens.split([frames * rows * columns for frames, rows, columns in self.grid])
        return [part.unflatten(0, sides) for part, sides in zip(parts, self.grid, strict=True)]
