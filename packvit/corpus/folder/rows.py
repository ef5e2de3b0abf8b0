"""A row of the feature folder, without its features. No torch or other slow import."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """What a part records of one input besides its features; the fields are the first columns.

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
        """The number of patches, 0 if unknown."""
        return (self.rows or 0) * (self.columns or 0)
