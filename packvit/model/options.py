"""What a caller chooses when an encoder is loaded; `packvit.load` says what each choice means."""

from dataclasses import dataclass
from typing import TypedDict

import torch

from packvit.config import GridPolicy, PatchOrder, check_choice


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadOptions` as keyword arguments, for type checkers."""

    device: torch.device | str | None
    dtype: torch.dtype | str | None
    attention: str
    patch_order: PatchOrder
    positions: GridPolicy
    invariant: bool
    compile: bool
    fp8: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options of `packvit.load`, checked.

    Raises: ValueError for a word that is no choice.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | str | None = None
    attention: str = "auto"
    patch_order: PatchOrder = "hwc"
    positions: GridPolicy = "checkpoint"
    invariant: bool = False
    compile: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        check_choice("patch_order", self.patch_order, ("hwc", "chw"))
        check_choice("positions", self.positions, ("checkpoint", "interpolate"))
