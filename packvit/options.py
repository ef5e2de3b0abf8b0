"""What a caller chooses when an encoder is loaded."""

from dataclasses import dataclass
from typing import Literal

import torch

from packvit.config import PatchOrder

GridPolicy = Literal["checkpoint", "interpolate"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller chooses when an encoder is loaded; None is chosen by the machine."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    attention: str
    patch_order: PatchOrder
    positions: GridPolicy
    invariant: bool = False
    compile: bool = False
    fp8: bool = False

    def __post_init__(self) -> None:
        check_choice("patch_order", self.patch_order, ("hwc", "chw"))
        check_choice("positions", self.positions, ("checkpoint", "interpolate"))
        if self.fp8 and self.invariant:
            raise ValueError(
                "fp8=True and invariant=True exclude each other: matmuls in fp8 are not batch "
                "invariant. Leave one of them out."
            )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError listing the choices if `value` is not one of them."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{name} is "{value}", but must be {listed}.')
