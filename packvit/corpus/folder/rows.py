"""What a job says of each input beside its features. No torch, and nothing else that is slow."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one input beside its features; its fields are the first columns.

    Units: `width` and `height` in pixels, upright; `rows` and `columns` in patches.
    """

    id: str
    status: str = "ok"
    stage: str | None = None
    note: str | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    rows: int | None = None
    columns: int | None = None

    @property
    def patches(self) -> int:
        """How many patches it has, as far as that is known."""
        return (self.rows or 0) * (self.columns or 0)
