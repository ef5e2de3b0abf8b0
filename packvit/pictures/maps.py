"""Colour every patch of photographs: by a PCA, or by similarity to one patch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from packvit.corpus import UsageError
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.images.decode import Source
from packvit.images.resize import Resize
from packvit.pictures.colours import BLANK, find_range, ramp, rescale, to_bytes
from packvit.pictures.components import Basis, find_foreground, fit
from packvit.pictures.sheet import WIDTH, Panel, draw_sheet, to_map
from packvit.pictures.tokens import Photographs, take_photographs

Background = Literal["keep", "remove"]
OVERLAY = 0.6  # of a map, over its photograph in grey


@dataclass(frozen=True, slots=True)
class Maps:
    """The colours of the patches of photographs, by index, and the variance they explain.

    Shapes: colours [rows, columns, 3] bytes; foreground [rows, columns], or None for all of it.
    """

    colours: dict[int, np.ndarray]
    foreground: dict[int, np.ndarray] | None
    shares: (
        list[float] | None
    )  # of the variance, by component; None if each photograph has its own PCA


def draw_pca(
    encoder: Encoder,
    images: Sequence[Source],
    *,
    layer: int | None = None,
    per_image: bool = False,
    background: Background = "keep",
    overlay: bool = False,
    resize: Resize | None = None,
    max_patches: int | None = None,
) -> Image.Image:
    """Return a picture of images next to their patches, coloured by three principal components.

    One PCA over the tokens of all images makes colours comparable; `per_image` gives each image its
    own. `background` "remove" leaves out the patches on one side of the first component, and
    colours the others by a second PCA. `layer` uses the tokens leaving that block. `overlay` draws
    the colours over the image. `resize` and `max_patches` are `Encoder.pack`'s.

    Raises: ImageError with the index and the code of the first image that cannot be used;
    ValueError for a layer that does not exist.
    """
    options = EmbedOptions(resize=resize, max_patches=max_patches)
    photographs = take_photographs(encoder, images, options, layer=layer)
    sheet = pca_sheet(photographs, per_image=per_image, background=background, overlay=overlay)
    photographs.refuse_errors()
    return sheet


def draw_similarity(
    encoder: Encoder,
    images: Sequence[Source],
    patch: tuple[int, int, int],
    *,
    layer: int | None = None,
    overlay: bool = False,
    resize: Resize | None = None,
    max_patches: int | None = None,
) -> Image.Image:
    """Return a picture of images next to the cosine of one patch to each of their patches.

    `patch` is (index of the image, row, column). The other arguments are `draw_pca`'s.

    Raises: as `draw_pca`; ValueError for a patch that does not exist.
    """
    options = EmbedOptions(resize=resize, max_patches=max_patches)
    photographs = take_photographs(encoder, images, options, layer=layer)
    if not 0 <= patch[0] < len(images):
        raise UsageError(
            f"patch names image {patch[0]}, but there are {len(images)}, counted from 0."
        )
    sheet = similarity_sheet(photographs, patch, overlay=overlay)
    photographs.refuse_errors()
    return sheet


def pca_sheet(
    photographs: Photographs,
    *,
    per_image: bool = False,
    background: Background = "keep",
    overlay: bool = False,
    width: int = WIDTH,
) -> Image.Image:
    """Return the sheet of `draw_pca` for photographs that were read."""
    maps = pca_maps(photographs, per_image=per_image, background=background)
    patches = sum(mask.sum() for mask in (maps.foreground or {}).values())
    patches = patches or sum(colours[..., 0].size for colours in maps.colours.values())
    noun = "foreground patches" if maps.foreground else "patches"
    of = f"{patches:,} {noun} of {count(len(maps.colours), 'photograph')}"
    if maps.shares is None:
        title = f"{photographs.source}: a PCA for each photograph, {of}"
    else:
        shares = ", ".join(f"{share:.0%}" for share in maps.shares)
        title = f"{photographs.source}: one PCA over {of} ({shares} of the variance)"
    return draw_sheet(
        title,
        [
            panel(photographs, place, colours, (maps.foreground or {}).get(place), overlay)
            for place, colours in sorted(maps.colours.items())
        ],
        width=width,
    )


def pca_maps(
    photographs: Photographs, *, per_image: bool = False, background: Background = "keep"
) -> Maps:
    """Return the colours of all patches.

    Signs are fixed by the loadings (see `fit`), the scale by percentiles over all patches shown.
    """
    if per_image:
        return own_maps(photographs, background)
    basis = fit(one.tokens for _, one in photographs.encode())
    values = photographs.maps(basis.project)
    foreground = None
    if background == "remove":
        foreground, basis, values = part(photographs, values)
    return Maps(colour(values, foreground), foreground, basis.shares)


def part(
    photographs: Photographs, values: dict[int, np.ndarray]
) -> tuple[dict[int, np.ndarray], Basis, dict[int, np.ndarray]]:
    """Return the foreground by the first component, its own basis, and all patches' coordinates."""
    found = find_foreground([value[..., 0] for value in values.values()])
    foreground = dict(zip(values, found, strict=True))
    basis = fit(one.tokens[foreground[i].reshape(-1)] for i, one in photographs.encode())
    return foreground, basis, photographs.maps(basis.project)


def own_maps(photographs: Photographs, background: Background) -> Maps:
    """Return the colours of all patches, with a PCA for each photograph."""
    colours, masks = {}, {}
    for place, one in photographs.encode():
        grid = photographs.grid(place)
        value = fit([one.tokens]).project(one.tokens)
        mask = None
        if background == "remove":
            [mask] = find_foreground([value[:, 0].reshape(grid)])
            value = fit([one.tokens[mask.reshape(-1)]]).project(one.tokens)
            masks[place] = mask
        shown = {place: value.reshape(*grid, -1)}
        colours |= colour(shown, None if mask is None else {place: mask})
    return Maps(colours, masks or None, None)


def colour(
    values: dict[int, np.ndarray], foreground: dict[int, np.ndarray] | None
) -> dict[int, np.ndarray]:
    """Return values along three components as red, green and blue, on one scale."""
    shown = [
        value[foreground[place]] if foreground else value.reshape(-1, value.shape[-1])
        for place, value in values.items()
    ]
    low, high = find_range(shown)
    colours = {place: to_bytes(rescale(value, low, high)) for place, value in values.items()}
    for place, mask in (foreground or {}).items():
        colours[place][~mask] = BLANK
    return colours


def similarity_sheet(
    photographs: Photographs,
    patch: tuple[int, int, int],
    *,
    overlay: bool = False,
    width: int = WIDTH,
) -> Image.Image:
    """Return the sheet of `draw_similarity` for photographs that were read."""
    place, row, column = patch
    similarity = similarities(photographs, patch)
    low, high = find_range([one.reshape(-1, 1) for one in similarity.values()])
    high = np.ones(1)  # the cosine of the patch to itself
    panels = [
        panel(photographs, i, ramp(rescale(one[..., None], low, high)[..., 0]), None, overlay)
        for i, one in sorted(similarity.items())
    ]
    mark(panels[sorted(similarity).index(place)].pictures[0], row, column, photographs)
    name = short(photographs, place)
    title = f"{photographs.source}: cosine to the patch at row {row}, column {column} of {name}"
    return draw_sheet(title, panels, scale=(float(low[0]), 1.0), width=width)


def similarities(photographs: Photographs, patch: tuple[int, int, int]) -> dict[int, np.ndarray]:
    """Return the cosine of one patch to all patches of all photographs, each [rows, columns].

    Raises: UsageError if the photograph has no such patch.
    """
    place, row, column = patch
    rows, columns = photographs.grid(place)
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(
            f"{photographs.prepared[place].row.id} has {rows} x {columns} patches, but row {row}, "
            f"column {column} was asked for. Rows are 0 to {rows - 1}, columns 0 to {columns - 1}."
        )
    wanted = next((one.tokens for i, one in photographs.encode() if i == place), None)
    if wanted is None:
        raise UsageError(f"The features of {photographs.prepared[place].row.id} are not finite.")
    chosen = unit(wanted[row * columns + column])
    return photographs.maps(lambda tokens: unit(tokens) @ chosen)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors scaled to length 1 in float64; zero vectors stay zero."""
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def panel(
    photographs: Photographs,
    place: int,
    colours: np.ndarray,
    foreground: np.ndarray | None,
    overlay: bool,
) -> Panel:
    """Return a panel of a photograph and its map."""
    photo = Image.fromarray(photographs.pixels(place))
    drawn = to_map(colours)
    if overlay:
        grey = photo.convert("L").convert("RGB")
        mixed = Image.blend(grey, drawn.resize(photo.size, Image.Resampling.NEAREST), OVERLAY)
        if foreground is not None:
            mask = Image.fromarray(foreground).resize(photo.size, Image.Resampling.NEAREST)
            mixed = Image.composite(mixed, grey, mask)
        drawn = mixed
    rows, columns = photographs.grid(place)
    return Panel((photo, drawn), (short(photographs, place), f"{rows} x {columns} patches"))


def mark(photo: Image.Image, row: int, column: int, photographs: Photographs) -> None:
    """Draw a black and white frame around one patch of a photograph."""
    side = photographs.encoder.config.patch
    box = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
    pen = ImageDraw.Draw(photo)
    for grown, shade in ((3, "black"), (2, "white"), (1, "white"), (0, "black")):
        pen.rectangle((box[0] - grown, box[1] - grown, box[2] + grown, box[3] + grown), None, shade)


def short(photographs: Photographs, place: int) -> str:
    """Return a photograph's name without its folders."""
    return PurePath(photographs.prepared[place].row.id).name


def count(number: int, noun: str) -> str:
    """Return a number with its noun, plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
