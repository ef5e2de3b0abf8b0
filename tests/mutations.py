"""Mistakes that an encoder can make, each made on purpose: a comparison must notice them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packvit.config import AxialRotary, Rotary, SinCos, Table
from packvit.encoder import Encoder
from packvit.model import positions
from packvit.model import rotary as rotations
from packvit.model.merging import Merging
from packvit.model.pooling import pool_sequences
from packvit.model.trunk import TrunkOutput
from packvit.packs.places import PatchPlaces

Mutate = Callable[[Encoder, pytest.MonkeyPatch], None]


def swap_queries_and_keys(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith("attention.qkv.weight") or (
            name.endswith("attention.qkv.bias") and encoder.config.qkv_bias == "qkv"
        ):
            query, key, value = parameter.data.chunk(3)
            parameter.data = torch.cat([key, query, value])


def swap_axes(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Take columns for rows, which no square grid of a symmetric table would show."""
    kind = encoder.config.positions
    if isinstance(kind, Table):
        turn_table(encoder, lambda square: square.transpose(0, 1))
    elif isinstance(kind, SinCos):
        make = positions.sine_cosine

        def swapped(axis: Tensor, places: PatchPlaces) -> Tensor:
            return make(axis, places).roll(axis.shape[1], 1)

        patch.setattr("packvit.model.embeddings.sine_cosine", swapped)
    elif isinstance(encoder.config.rotary, AxialRotary):
        swap_rotary_axes(encoder, patch)
    else:
        assert isinstance(encoder.config.rotary, Rotary)
        turn = rotations.rotate

        def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            quarter = cosine.shape[1] // 4
            return turn(heads, cosine.roll(quarter, 1), sine.roll(quarter, 1))

        for user in ("packvit.model.layers", "packvit.fast.cpu"):
            patch.setattr(f"{user}.rotate", rotate)


def turn_table(encoder: Encoder, change: Callable[[Tensor], Tensor]) -> None:
    """Change a table of positions, but for the class token's. Shapes: [rows, columns, D]."""
    kind = encoder.config.positions
    assert isinstance(kind, Table)
    table = encoder.embeddings.positions.data
    first, rest = table[: kind.class_row], table[kind.class_row :]
    square = change(rest.unflatten(0, (kind.rows, kind.columns)))
    encoder.embeddings.positions.data = torch.cat([first, square.flatten(0, 1)])


def move_positions_by_half_a_patch(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    kind = encoder.config.positions
    if isinstance(kind, Table):
        turn_table(encoder, lambda square: (square + square.roll(1, 1)) / 2)
    elif isinstance(kind, SinCos):

        def moved(
            positions: SinCos, side: int, width: int, device: torch.device, dtype: torch.dtype
        ) -> Tensor:
            octave = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
            places = torch.arange(side, dtype=torch.float64) + 0.5
            angles = places.outer(1.0 / positions.temperature**octave)
            return torch.cat([angles.sin(), angles.cos()], dim=1).to(device, dtype)

        patch.setattr(positions, "sine_cosine_axis", moved)
    else:
        assert isinstance(encoder.config.rotary, Rotary)

        def rotary(
            kind: Rotary, places: PatchPlaces, head_dim: int, dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            """As it is, from each patch's corner instead of its centre."""
            place = torch.stack([places.row, places.column], 1)
            coordinates = 2 * (place / torch.stack([places.rows, places.columns], 1)) - 1
            octave = kind.base ** torch.arange(0, 1, 4 / head_dim)
            angles = (2 * torch.pi * coordinates[:, :, None] / octave).flatten(1).tile(2)
            return angles.cos().to(dtype), angles.sin().to(dtype)

        patch.setattr("packvit.model.embeddings.rotary", rotary)


def change_epsilon(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Take 1e-5 for 1e-6, or the other way round."""
    other = 1e-5 if encoder.config.norm_eps < 1e-5 else 1e-6
    for module in encoder.modules():
        if hasattr(module, "eps"):
            vars(module)["eps"] = other


def use_the_other_gelu(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Take tanh's approximation for erf, or the other way round."""
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
    for module in encoder.modules():
        name = getattr(module, "activation", None)
        if name in other:
            module.activation = other[name]  # pyright: ignore[reportArgumentType]


def use_another_activation(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    mlp = encoder.get_submodule("encoder.layers.0.mlp")
    patch.setattr(mlp, "activation", "gelu" if mlp.activation == "silu" else "silu")


def skip_a_layer_scale(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    encoder.get_submodule("encoder.layers.1").register_module("mlp_scale", nn.Identity())


def drop_a_bias(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Forget the bias of the last block's MLP, or of the patches where no block has one."""
    last = f"encoder.layers.{encoder.config.layers - 1}.mlp.down.bias"
    biases = dict(encoder.named_parameters())
    biases.get(last, biases.get("embeddings.patches.bias", torch.empty(0))).data.zero_()


def turn_antialiasing_over(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    table = encoder.config.positions
    assert isinstance(table, Table)
    mode = positions.MODES[table.resize]
    patch.setitem(positions.MODES, table.resize, mode._replace(antialias=not mode.antialias))


def pool_the_first_register(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    def pool(output: TrunkOutput, *rest: Any) -> Tensor | None:
        return pool_sequences(output._replace(prefix=output.prefix.roll(-1, 1)), *rest)

    patch.setattr("packvit.encoder.pool_sequences", pool)


def swap_rotary_axes(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Take the column's angles for the row's, beside a table that is right."""
    make = rotations.axial_rotary

    def swapped(kind: AxialRotary, places: PatchPlaces, head_dim: int) -> tuple[Tensor, Tensor]:
        other = "column_row" if kind.order == "row_column" else "row_column"
        return make(replace(kind, order=other), places, head_dim)

    patch.setattr("packvit.model.embeddings.axial_rotary", swapped)


def lay_squares_by_columns(encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    merge = Merging.merge

    def turned(merging: Merging, tokens: Tensor) -> Tensor:
        return merge(merging, tokens).unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)

    patch.setattr(Merging, "merge", turned)


MISTAKES: dict[str, Mutate] = {
    "queries and keys swapped": swap_queries_and_keys,
    "axes of a grid swapped": swap_axes,
    "positions half a patch off": move_positions_by_half_a_patch,
    "eps of 1e-5 for 1e-6": change_epsilon,
    "tanh's GELU for erf's": use_the_other_gelu,
    "another activation": use_another_activation,
    "a LayerScale left out": skip_a_layer_scale,
    "a bias dropped": drop_a_bias,
    "antialiasing on for off": turn_antialiasing_over,
    "first register for class token": pool_the_first_register,
    "rotary axes swapped": swap_rotary_axes,
    "squares laid together column by column": lay_squares_by_columns,
}


def applies(encoder: Encoder, mistake: str) -> bool:
    """Whether an encoder has what a mistake is about."""
    config, table = encoder.config, encoder.config.positions
    if mistake == "tanh's GELU for erf's":
        return config.activation in ("gelu", "gelu_tanh")
    if mistake == "a LayerScale left out":
        return config.layer_scale
    if mistake == "antialiasing on for off":
        interpolates = encoder.family.reference.interpolates
        return isinstance(table, Table) and (table.any_grid or interpolates)
    if mistake == "first register for class token":
        return config.registers > 0
    if mistake == "positions half a patch off" and table is None:
        return isinstance(config.rotary, Rotary)  # places that count turn by what lies between them
    if mistake == "rotary axes swapped":
        return isinstance(config.rotary, AxialRotary)
    if mistake == "squares laid together column by column":
        return config.merger is not None
    return True
