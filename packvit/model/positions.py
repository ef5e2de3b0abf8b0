"""Absolute positions, which are added to patches: pure functions of the grid on the host.

Everything is computed in float64 or float32 and rounded once to the encoder's dtype: a sine-cosine
table built in bfloat16 is wrong by 0.08 on a 16 x 16 grid and by 1.4 on 16 x 256.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from packvit.config import SinCos, Table, TableResize
from packvit.packs.grid import Grid, to_device
from packvit.packs.places import PatchPlaces


class Mode(NamedTuple):
    """How torch interpolates."""

    name: str
    antialias: bool = False
    corners: bool = False  # lie on corners, and not outer edges on edges


MODES: dict[TableResize, Mode] = {
    "bilinear": Mode("bilinear"),
    "bilinear_antialias": Mode("bilinear", antialias=True),
    "bilinear_corners": Mode("bilinear", corners=True),
    "bicubic": Mode("bicubic"),
    "bicubic_antialias": Mode("bicubic", antialias=True),
    "square_then_crop": Mode("bilinear"),
}


def sine_cosine(axis: Float[Tensor, "side half"], places: PatchPlaces) -> Float[Tensor, "T D"]:
    """Return [sin x | cos x | sin y | cos y] of every patch, x being its column.

    Source: AIMv2 in ml-aim (`aim-v2`) and in transformers 5.17: column first.
    """
    return torch.cat([axis.index_select(0, at) for at in (places.column, places.row)], dim=1)


def sine_cosine_axis(
    positions: SinCos, side: int, width: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "side half"]:
    """Return [sin | cos] of the coordinates 0 to side - 1.

    Source: as `sine_cosine`: omega_k = temperature ** (-k / (D / 4)).
    """
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    octave = torch.arange(width // 4, dtype=torch.float64, device=exact) / (width // 4)
    angles = torch.arange(side, dtype=torch.float64, device=exact).outer(
        1.0 / positions.temperature**octave
    )
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype).to(device)


class Axes:
    """The sine-cosine axis of an encoder, made once and again when a longer one is asked for."""

    def __init__(self, positions: SinCos, width: int) -> None:
        self.positions, self.width = positions, width
        self.made: Tensor | None = None

    def get(
        self, side: int, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "side half"]:
        """Return an axis at least as long as the longest side of the pack."""
        made = self.made
        if made is None or len(made) < side or (made.device, made.dtype) != (device, dtype):
            with torch.inference_mode(False):  # what is kept must serve training too
                length = max(64, 1 << (side - 1).bit_length())
                made = sine_cosine_axis(self.positions, length, self.width, device, dtype)
            self.made = made
        return made

    def __reduce__(self) -> tuple[type["Axes"], tuple[SinCos, int]]:
        """Copy and pickle empty."""
        return Axes, (self.positions, self.width)


def check_grid(positions: Table, grid: Grid, patch: int) -> None:
    """Refuse grids that the table was not made for.

    Raises: ValueError naming the first such image, and both remedies.
    """
    native = (positions.rows, positions.columns)
    for image, (_, rows, columns) in enumerate(grid):
        if (rows, columns) != native:
            same = " (the same number of patches in another shape)"
            note = same if rows * columns == native[0] * native[1] else ""
            raise ValueError(
                f"Image {image} is {rows} x {columns} patches{note}, but this checkpoint learned "
                f"positions for {native[0]} x {native[1]} alone. Resize images to "
                f"{native[0] * patch} x {native[1] * patch} pixels, or load the encoder with "
                'positions="interpolate".'
            )


def frame_waves(
    grid: Grid, most: int, places: PatchPlaces, width: int, dtype: torch.dtype
) -> Float[Tensor, "T D"] | None:
    """Return [sin | cos] of each patch's frame, zeros for images; None where all are images.

    Raises: ValueError for a clip of more than `most` frames.
    Source: Kimi K2.5 in transformers 5.17, models/kimi_k25: in fp32.
    """
    counts = [frames for frames, _, _ in grid]
    longest = max(counts)
    if longest > most:
        raise ValueError(
            f"Image {counts.index(longest)} has {longest} frames, but this checkpoint tells {most} "
            "apart. Cut the clip into shorter ones."
        )
    if longest == 1:
        return None
    octave = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    number = torch.arange(longest, dtype=torch.float32, device="cpu")
    angles = number.outer(1.0 / 10000**octave)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    table = torch.cat([waves.new_zeros(1, width), waves]).to(dtype)
    rows = [0 if count == 1 else 1 + frame for count in counts for frame in range(count)]
    device = places.sequence.device
    row = to_device(np.array(rows), device).index_select(0, places.sequence)
    return table.to(device, non_blocking=True).index_select(0, row)


class ResizedTables:
    """A learned table resized to recent grids, so that each is computed once.

    Kept are at most `most` patches' rows, the oldest grids going first. A table that is trained, or
    has been replaced, is resized again. What is written through `table.data` in place
    leaves no trace to see; `forget` is for that.
    """

    def __init__(self, positions: Table, most: int = 2**16) -> None:
        self.positions = positions
        self.most = most
        self.forget()

    def forget(self) -> None:
        """Forget all resized tables."""
        self.kept: dict[tuple[int, int], Tensor] = {}  # in the order they were made
        self.made_from: tuple[object, ...] = ()  # what told the table from others

    def bank(
        self,
        table: Float[Tensor, "places D"],
        grids: Sequence[tuple[int, int]],
        *,
        invariant: bool = False,
    ) -> Float[Tensor, "patches D"]:
        """Return the patches' rows of `table` for several distinct grids, end to end."""
        if not (torch.is_grad_enabled() and table.requires_grad):
            return torch.cat([self.get(table, rows, columns) for rows, columns in grids])
        self.forget()  # an optimizer follows, and fused ones leave no trace
        patches = table[1:] if self.positions.class_row else table
        if table.is_cuda and not invariant:  # where many small launches keep the device waiting
            return resize_together(self.positions, patches, grids)
        return torch.cat([resize(self.positions, patches, *sides) for sides in grids])

    def get(
        self, table: Float[Tensor, "places D"], rows: int, columns: int
    ) -> Float[Tensor, "patches D"]:
        """Return the patches' rows of `table` for a grid of `rows` x `columns`, for inference."""
        patches = table[1:] if self.positions.class_row else table
        native = (self.positions.rows, self.positions.columns)
        if table.is_inference() or (rows, columns) == native:
            return resize(self.positions, patches, rows, columns)
        told = (id(table), table.data_ptr(), table._version, table.dtype, table.device)
        if self.made_from != told:
            self.kept, self.made_from = {}, told
        if (rows, columns) not in self.kept:
            # What is kept must serve training too, which inference tensors cannot.
            with torch.inference_mode(False), torch.no_grad():
                self.kept[rows, columns] = resize(self.positions, patches, rows, columns)
            while sum(map(len, self.kept.values())) > self.most and len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
        return self.kept[rows, columns]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ResizedTables":
        """Start empty: a copied encoder has its own table."""
        return ResizedTables(self.positions, self.most)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle empty."""
        return vars(ResizedTables(self.positions, self.most))


def look_up(
    tables: ResizedTables,
    table: Float[Tensor, "places D"],
    places: PatchPlaces,
    grid: Grid,
    *,
    invariant: bool = False,
) -> Float[Tensor, "T D"]:
    """Return every patch's row of the table, resized once for each distinct grid of the pack.

    If `invariant`, a grid's rows do not depend on the other grids.
    """
    distinct = list(dict.fromkeys((rows, columns) for _, rows, columns in grid))
    bank = tables.bank(table, distinct, invariant=invariant)
    sizes = np.array([rows * columns for rows, columns in distinct])
    starts = dict(zip(distinct, (sizes.cumsum() - sizes).tolist(), strict=True))
    of_frames = [starts[rows, columns] for frames, rows, columns in grid for _ in range(frames)]
    start = to_device(np.array(of_frames), table.device).index_select(0, places.sequence)
    return bank.index_select(0, start + places.row * places.columns + places.column)


def resize_together(
    positions: Table, table: Float[Tensor, "places D"], grids: Sequence[tuple[int, int]]
) -> Float[Tensor, "patches D"]:
    """Return the table for several grids, end to end, by one matmul in fp32, for training.

    To resize is linear, in each direction by itself: a patch is a sum of the table's places, its
    row's weights times its column's. One derivative for all grids, where 52 took 14 of 236 ms of
    SigLIP2-so400m's training step on an H100.
    """
    places = PatchPlaces.from_grid(tuple((1, *grid) for grid in grids), device=table.device)
    sides = list(zip(*grids, strict=True))  # of all grids: rows, columns
    along = []
    wholes = list(zip(*(whole_grid(positions, *grid) for grid in grids), strict=True))
    for before, afters, whole, place in zip(
        (positions.rows, positions.columns), sides, wholes, (places.row, places.column), strict=True
    ):
        weights = [
            side_weights(positions.resize, before, n, table.device)[:kept]
            for n, kept in zip(whole, afters, strict=True)
        ]
        lengths = np.array(afters)
        first = to_device(lengths.cumsum() - lengths, table.device)
        at = first.index_select(0, places.sequence) + place
        along.append(torch.cat(weights).index_select(0, at))
    weights = (along[0][:, :, None] * along[1][:, None, :]).flatten(1)  # [patches, places]
    with torch.autocast(table.device.type, enabled=False):
        return (weights @ table.float()).to(table.dtype)


@lru_cache(maxsize=4096)  # of some 2 KB
def side_weights(
    kind: TableResize, before: int, after: int, device: torch.device
) -> Float[Tensor, "after before"]:
    """Return how a side of `before` places is resized to one of `after`, as a matrix in fp32.

    Source: torch's own interpolation, of the unit vectors.
    """
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(before, dtype=torch.float64, device="cpu").view(1, before, before, 1)
        found = interpolate(unit, (after, 1), MODES[kind])
        return found[0, :, :, 0].T.float().contiguous().to(device)


def resize(
    positions: Table, table: Float[Tensor, "places D"], rows: int, columns: int
) -> Float[Tensor, "patches D"]:
    """Return the table for a grid of `rows` x `columns`, interpolated in fp32, rounded once."""
    whole = whole_grid(positions, rows, columns)
    if whole == (rows, columns) == (positions.rows, positions.columns):
        return table
    image = table.float().T.reshape(1, -1, positions.rows, positions.columns)
    resized = interpolate(image, whole, MODES[positions.resize])[..., :rows, :columns]
    return resized[0].flatten(1).T.to(table.dtype)


def whole_grid(positions: Table, rows: int, columns: int) -> tuple[int, int]:
    """Return the grid that a table is resized to, of which `rows` x `columns` are taken."""
    longer = max(rows, columns)
    return (longer, longer) if positions.resize == "square_then_crop" else (rows, columns)


def interpolate(
    image: Float[Tensor, "1 D tall wide"], size: tuple[int, int], mode: Mode
) -> Float[Tensor, "1 D rows columns"]:
    """Return an image of D channels resized, as `F.interpolate`, but right for one column too.

    To one column torch (seen in 2.13, on the CPU) resizes wrongly when it antialiases: all rows
    come out as the first one does. To one row it does not, so the image is turned over.
    Elsewhere than on CPUs and CUDA it may lack these kernels, so there the CPU resizes.
    """
    over = size[1] == 1
    given = (image.transpose(2, 3) if over else image).contiguous()
    if given.device.type not in ("cpu", "cuda", "meta"):
        given = given.cpu()
    wanted = size[::-1] if over else size
    resized = F.interpolate(
        given, wanted, mode=mode.name, align_corners=mode.corners, antialias=mode.antialias
    )
    return (resized.transpose(2, 3) if over else resized).to(image.device)
