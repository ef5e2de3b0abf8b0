"""Random views of photographs: whole ones, and crops from within them.

Processes on the host plan where to cut and how to colour; the device resizes with antialiasing and
colours all patches of a pack at once. A view is made at its own size, so packs are ragged, as they
are in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from packvit.config import ImageConfig

LUMA = np.array([0.299, 0.587, 0.114])
CROPS = 2  # of each photograph


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a photograph in pixels, and the patches that it becomes."""

    left: float
    top: float
    width: float
    height: float
    rows: int
    columns: int
    mirrored: bool = False

    @property
    def patches(self) -> int:
        """How many patches the view has."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Views:
    """A pack of views, and what the losses need to know of it.

    Shapes: patches [T, P] in 0 to 1; grid [V, 3] on the host; view [T]; counts [V].
    """

    patches: Tensor
    grid: Tensor
    view: Tensor  # which view a patch belongs to
    counts: Tensor  # patches of each view


def read_photographs(folder: Path, device: torch.device) -> list[Tensor]:
    """Return the photographs of a folder as uint8 [3, height, width] on the device."""
    paths = sorted(folder.glob("*.jpg"))
    images = [np.array(Image.open(path).convert("RGB")) for path in paths]
    return [torch.from_numpy(image).permute(2, 0, 1).contiguous().to(device) for image in images]


def place_box(
    draw: np.random.Generator,
    within: Box,
    width: float,
    height: float,
    patch: int,
    scale: tuple[float, float],
    most: int,
) -> Box:
    """Draw where a rectangle lies within another, its resolution, and whether it is mirrored."""
    width, height = min(width, within.width), min(height, within.height)
    left = within.left + draw.uniform(0, within.width - width)
    top = within.top + draw.uniform(0, within.height - height)
    zoom = min(draw.uniform(*scale), sqrt(most * patch**2 / (width * height)))
    rows, columns = (max(2, round(side * zoom / patch)) for side in (height, width))
    return Box(left, top, width, height, rows, columns, bool(draw.random() < 0.5))


def draw_colours(
    draw: np.random.Generator, strength: float, hue: tuple[float, float]
) -> np.ndarray:
    """Draw a change of colours as a matrix [3, 4] that acts on (red, green, blue, 1).

    Exposure, white balance, saturation and contrast by up to `strength`, hue by `hue` turns.
    """
    jitter = draw.uniform(-strength, strength, 6)
    turn = 2 * np.pi * draw.uniform(*hue)
    grey = np.ones((3, 3)) / 3  # a turn about the grey axis
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / sqrt(3)
    turned = np.cos(turn) * np.eye(3) + (1 - np.cos(turn)) * grey + np.sin(turn) * cross
    luma = np.tile(LUMA, (3, 1))
    saturated = luma + (1 + jitter[0]) * (np.eye(3) - luma)
    gain = np.exp2(jitter[1]) * np.diag(1 + 0.4 * jitter[2:5])
    contrast = 1 + 0.6 * jitter[5]
    matrix = contrast * saturated @ turned @ gain
    return np.concatenate([matrix, np.full((3, 1), 0.5 * (1 - contrast))], axis=1)


def chain(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the change of colours that does `first`, then `second`."""
    return second @ np.concatenate([first, [[0, 0, 0, 1]]])


def cut(photo: Tensor, box: Box, patch: int) -> Tensor:
    """Return a view's patches [rows * columns, P] as floats in 0 to 255."""
    top, left = round(box.top), round(box.left)
    part = photo[:, top : top + max(1, round(box.height)), left : left + max(1, round(box.width))]
    size = (box.rows * patch, box.columns * patch)
    image = F.interpolate(part[None].float(), size, mode="bicubic", antialias=True)[0]
    if box.mirrored:
        image = image.flip(-1)
    image = image.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # C rows p columns p
    return image.permute(1, 3, 2, 4, 0).reshape(box.patches, -1)


def assemble(photos: Sequence[Tensor], boxes: Sequence[Box], colours: Tensor, patch: int) -> Views:
    """Cut all boxes and lay them end to end, each in its colours."""
    device = photos[0].device
    patches = torch.cat([cut(photo, box, patch) for photo, box in zip(photos, boxes, strict=True)])
    counts = np.array([box.patches for box in boxes])
    view = torch.from_numpy(np.repeat(np.arange(len(boxes)), counts)).to(device, non_blocking=True)
    table = colours.to(device, non_blocking=True)[view]  # [T, 3, 4]
    pixels = patches.div_(255).unflatten(1, (-1, 3)) @ table[:, :, :3].mT + table[:, None, :, 3]
    grid = torch.tensor([[1, box.rows, box.columns] for box in boxes])
    sizes = torch.from_numpy(counts).to(device, non_blocking=True)
    return Views(pixels.clamp_(0, 1).flatten(1), grid, view, sizes)


def normalise(patches: Tensor, images: ImageConfig) -> Tensor:
    """Return patches in 0 to 1 as the encoder takes floating point ones."""
    mean, std = (torch.tensor(x, device=patches.device) for x in (images.mean, images.std))
    return ((patches.unflatten(1, (-1, 3)) - mean) / std).flatten(1)


def places(crops: Sequence[Box], wholes: Sequence[Box]) -> np.ndarray:
    """Return, for every patch of the crops, the patch of the whole view at the same place."""
    starts = np.cumsum([0, *(whole.patches for whole in wholes)])
    found = []
    for index, crop in enumerate(crops):
        whole = wholes[index % len(wholes)]
        along = np.arange(crop.columns) + 0.5
        across = crop.columns - along if crop.mirrored else along
        x = (crop.left + across * crop.width / crop.columns - whole.left) / whole.width
        y = crop.top + (np.arange(crop.rows) + 0.5) * crop.height / crop.rows - whole.top
        column = np.clip((x * whole.columns).astype(int), 0, whole.columns - 1)
        if whole.mirrored:
            column = whole.columns - 1 - column
        row = np.clip((y / whole.height * whole.rows).astype(int), 0, whole.rows - 1)
        found.append((starts[index % len(wholes)] + row[:, None] * whole.columns + column).ravel())
    return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one batch is cut from and how: N wholes, then the first crop of each, then the second.

    Shapes: colours [N, 3, 4] of the wholes and [2 N, 3, 4] of the crops; where [T] names for each
    patch of the crops the patch of the wholes at the same place.
    """

    chosen: list[int]
    wholes: list[Box]
    crops: list[Box]
    whole_colours: Tensor
    crop_colours: Tensor
    where: Tensor


class Plans(Dataset[Plan]):
    """The plan of each step, drawn from a seed of its own: a run that is resumed draws the same.

    Every photograph of a batch is in it twice: as it is, and recoloured, which makes another of it
    and colours worth looking at.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, seed: int, count: int, patch: int, most: int
    ) -> None:
        self.sizes = sizes  # (height, width)
        self.seed = seed
        self.count = min(count, len(sizes))
        self.patch = patch
        self.most = most  # patches of a whole view; a crop has a third at most

    def __getitem__(self, step: int) -> Plan:
        """Return the plan of one step."""
        draw = np.random.default_rng((self.seed, step))
        chosen = draw.choice(len(self.sizes), self.count, replace=False).tolist() * 2
        shades = [np.eye(3, 4)] * self.count
        shades += [draw_colours(draw, 0.3, (0.1, 0.9)) for _ in range(self.count)]
        wholes = [self.draw_whole(draw, *self.sizes[index]) for index in chosen]
        crops = [self.draw_crop(draw, whole) for whole in wholes * CROPS]
        looks = [chain(draw_look(draw), shade) for shade in shades * CROPS]
        return Plan(
            chosen,
            wholes,
            crops,
            torch.from_numpy(np.stack(shades).astype(np.float32)),
            torch.from_numpy(np.stack(looks).astype(np.float32)),
            torch.from_numpy(places(crops, wholes)),
        )

    def draw_whole(self, draw: np.random.Generator, height: int, width: int) -> Box:
        """Draw the whole view of a photograph: half the time all of it, else most of it."""
        side = sqrt(draw.uniform(0.5, 1)) if draw.random() < 0.5 else 1
        most = int(draw.uniform(0.2, 1) * self.most)
        full = Box(0, 0, width, height, 1, 1)
        return place_box(draw, full, side * width, side * height, self.patch, (0.6, 1), most)

    def draw_crop(self, draw: np.random.Generator, whole: Box) -> Box:
        """Draw a crop of 6 to 45 % of a whole view, sides between 1:2 and 2:1."""
        side = sqrt(draw.uniform(0.06, 0.45) * whole.width * whole.height)
        ratio = exp(draw.uniform(-log(2) / 2, log(2) / 2))
        wide, high = side * ratio, side / ratio
        return place_box(draw, whole, wide, high, self.patch, (0.5, 1.2), self.most // 3)


def cut_batch(photos: Sequence[Tensor], plan: Plan, patch: int) -> tuple[Views, Views, Tensor]:
    """Return the whole views, the crops, and for the crops' patches the place in the wholes."""
    chosen = [photos[index] for index in plan.chosen]
    return (
        assemble(chosen, plan.wholes, plan.whole_colours, patch),
        assemble(chosen * CROPS, plan.crops, plan.crop_colours, patch),
        plan.where.to(photos[0].device, non_blocking=True),
    )


def draw_look(draw: np.random.Generator) -> np.ndarray:
    """Draw how a crop's colours differ from its photograph's: often not at all."""
    kind = draw.random()
    if kind < 0.4:
        return np.eye(3, 4)
    if kind < 0.95:
        return draw_colours(draw, 0.5, (-0.03, 0.03))
    return np.concatenate([np.tile(LUMA, (3, 1)), np.zeros((3, 1))], axis=1)
