import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from packvit.config import AxialRotary, SinCos, Table
from packvit.model.positions import (
    MODES,
    ResizedTables,
    look_up,
    resize,
    resize_together,
    sine_cosine,
    sine_cosine_axis,
)
from packvit.model.rotary import axial_rotary, rotate
from packvit.packs.places import PatchPlaces

CPU = torch.device("cpu")
GRID = ((1, 3, 17), (2, 1, 9), (1, 64, 2), (1, 1, 1))


def test_sine_cosine_is_the_formula_column_first():
    found = sine_cosine(
        sine_cosine_axis(SinCos(), 32, 16, CPU, torch.float64), PatchPlaces.from_grid(GRID[:1])
    )
    for row in range(3):
        for column in range(17):
            omegas = [10000 ** (-k / 4) for k in range(4)]
            expected = [
                wave(place * omega)
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for omega in omegas
            ]
            assert found[row * 17 + column].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sine_cosine_is_the_references_to_the_last_bit(dtype: torch.dtype):
    found = sine_cosine(sine_cosine_axis(SinCos(), 64, 64, CPU, dtype), PatchPlaces.from_grid(GRID))
    expected = []
    for frames, rows, columns in GRID:
        table = build_2d_sinusoidal_position_embedding(rows, columns, 64, dtype=dtype)
        expected += [torch.cat([table[:, 32:], table[:, :32]], 1)] * frames
    assert torch.equal(found, torch.cat(expected))


def test_a_table_on_its_own_grid_is_looked_up_unchanged():
    positions, table = Table(3, 5, "bicubic"), torch.randn(15, 8)
    grid = ((1, 3, 5), (2, 3, 5))
    found = look_up(ResizedTables(positions), table, PatchPlaces.from_grid(grid), grid)
    assert torch.equal(found, table.repeat(3, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bilinear", {"mode": "bilinear"}),
        ("bilinear_antialias", {"mode": "bilinear", "antialias": True}),
        ("bilinear_corners", {"mode": "bilinear", "align_corners": True}),
        ("bicubic", {"mode": "bicubic"}),
        ("bicubic_antialias", {"mode": "bicubic", "antialias": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_grids_are_interpolated_in_fp32_and_rounded_once(name, options, dtype):
    table = torch.randn(15, 8, dtype=dtype)
    positions = Table(3, 5, name)
    grid = ((1, 2, 7), (1, 3, 5), (1, 9, 1), (2, 2, 7))
    found = look_up(ResizedTables(positions), table, PatchPlaces.from_grid(grid), grid)
    image = table.float().view(1, 3, 5, 8).permute(0, 3, 1, 2).contiguous()
    expected = []
    for frames, rows, columns in grid:
        with reference.right_interpolation():
            bent = F.interpolate(image, size=(rows, columns), **options)
        flat = bent[0].permute(1, 2, 0).reshape(-1, 8).to(dtype)
        expected += [table if (rows, columns) == (3, 5) else flat] * frames
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("sides", [(3, 9), (9, 3), (7, 7), (6, 7), (1, 1)])
def test_a_square_then_crop_is_the_top_left_of_the_longer_sides_square(sides):
    table = torch.randn(49, 8)
    found = resize(Table(7, 7, "square_then_crop"), table, *sides)
    image = table.view(1, 7, 7, 8).permute(0, 3, 1, 2)
    square = F.interpolate(image, size=(max(sides), max(sides)), mode="bilinear")
    cut = square[0, :, : sides[0], : sides[1]].permute(1, 2, 0)
    torch.testing.assert_close(found, cut.reshape(-1, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "mode", "corners"),
    [("bilinear_corners", "bilinear", True), ("bicubic", "bicubic", False)],
)
def test_grids_are_what_transformers_towers_take_from_their_tables(name, mode, corners):
    table = torch.randn(100, 8)
    for rows, columns in [(2, 46), (38, 2), (1, 1), (10, 10), (3, 64)]:
        grid = torch.tensor([[1, rows, columns]])
        at, weights = get_vision_interpolation_indices_and_weights(grid, 10, mode, corners)
        expected = (table[at] * weights[:, :, None]).sum(1)
        found = resize(Table(10, 10, name), table, rows, columns)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "positions",
    [
        AxialRotary(),
        AxialRotary(100.0, "column_row", "interleaved", 1),
        AxialRotary(order="column_row"),
        AxialRotary(layout="interleaved"),
    ],
)
def test_axial_positions_turn_pairs_as_complex_numbers(positions: AxialRotary):
    places = PatchPlaces.from_grid(((1, 2, 46), (2, 38, 2)))
    heads = torch.randn(92 + 152, 3, 16, dtype=torch.float64)
    found = rotate(heads, *axial_rotary(positions, places, 16))
    pairs = torch.complex(heads[..., :8], heads[..., 8:])
    axes = [places.row, places.column]
    axes = axes if positions.order == "row_column" else axes[::-1]
    ladder = [(axis, positions.base ** (-k / 4)) for axis in axes for k in range(4)]
    if positions.layout == "interleaved":
        ladder = [ladder[4 * axis + k] for k in range(4) for axis in range(2)]
    angles = [(axis + positions.offset).double() * omega for axis, omega in ladder]
    turned = pairs * torch.exp(1j * torch.stack(angles, 1))[:, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_gradients_reach_the_table_through_every_grid():
    table = torch.randn(15, 8, requires_grad=True)
    resize(Table(3, 5, "bicubic_antialias"), table, 2, 7).sum().backward()
    assert table.grad is not None
    assert bool((table.grad != 0).all())


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_grids_resized_together_are_each_resized(name, device: str):
    grids = [(2, 7), (3, 5), (9, 2), (1, 12), (19, 3), (9, 1)]
    positions = Table(3, 5, name)
    table = torch.randn(15, 8, device=device, requires_grad=True)
    pull = torch.randn(sum(rows * columns for rows, columns in grids), 8, device=device)
    together = resize_together(positions, table, grids)
    apart = torch.cat([resize(positions, table, *sides) for sides in grids])
    torch.testing.assert_close(together, apart, atol=2e-6, rtol=0)
    [found], [expected] = (
        torch.autograd.grad((bank * pull).sum(), table) for bank in (together, apart)
    )
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["bilinear_antialias", "bicubic_antialias"])
def test_antialiased_grids_are_what_pillow_makes_of_them(name):
    """Grids of one column too, which torch itself resizes wrongly."""
    table = torch.randn(35, 8, generator=torch.Generator().manual_seed(0))
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for rows, columns in [(19, 1), (3, 1), (1, 19), (1, 1), (4, 3), (9, 12)]:
        expected = [
            np.asarray(Image.fromarray(channel).resize((columns, rows), how[MODES[name].name]))
            for channel in table.T.reshape(8, 7, 5).numpy()
        ]
        found = resize(Table(7, 5, name), table, rows, columns)
        wanted = torch.from_numpy(np.stack(expected)).flatten(1).T
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)


def test_a_grid_is_resized_once_until_the_table_changes(monkeypatch: pytest.MonkeyPatch):
    positions = Table(5, 5, "bicubic", class_row=True)
    table = torch.nn.Parameter(torch.randn(26, 8))
    tables, made = ResizedTables(positions, most=100), []

    def counted(*args):
        made.append(args[2:])
        return resize(*args)

    monkeypatch.setattr("packvit.model.positions.resize", counted)

    def ask(*grids: tuple[int, int]) -> None:
        for rows, columns in grids:
            found = tables.get(table, rows, columns)
            assert torch.equal(found, resize(positions, table[1:], rows, columns))

    with torch.inference_mode():
        ask((3, 7), (3, 7), (9, 2), (3, 7))
    assert made == [(3, 7), (9, 2)]
    with torch.no_grad():
        ask((3, 7))
        assert made == [(3, 7), (9, 2)]  # what inference kept serves elsewhere
        table.mul_(2)
        ask((3, 7))
        assert made == [(3, 7), (9, 2), (3, 7)]
        ask((9, 10), (3, 7))  # 90 + 21 patches are more than are kept: the oldest goes
    assert made[3:] == [(9, 10), (3, 7)]
    assert tables.bank(table, [(3, 7)]).requires_grad  # trained now, and nothing is kept
    assert not tables.kept


def test_torch_still_antialiases_wrongly_to_one_column_on_a_cpu():
    """When this fails torch is mended, and the way round it in model/positions.py can go."""
    image = torch.randn(1, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"mode": "bilinear", "antialias": True}
    found = torch.nn.functional.interpolate(image, size=(9, 1), **options)
    turned = torch.nn.functional.interpolate(image.mT.contiguous(), size=(1, 9), **options).mT
    assert (found - turned).abs().max() > 0.1
