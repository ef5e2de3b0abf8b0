"""A contact sheet of photographs and their nearest neighbours in a feature folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from packvit.corpus import UsageError
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.images.decode import Source, load_image
from packvit.images.errors import ImageError
from packvit.pictures.colours import BLANK
from packvit.pictures.maps import count, short
from packvit.pictures.sheet import APART, WIDTH, Panel, draw_sheet
from packvit.pictures.tokens import Photographs, take_photographs
from packvit.retrieval.folders import Vectors, open_vectors
from packvit.retrieval.models import check_model
from packvit.retrieval.nearest import find_nearest

COUNT = 6
THUMBNAIL = 480  # pixels a side at most


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row of a feature folder, and its cosine to the query."""

    id: str
    score: float


def draw_neighbours(
    encoder: Encoder,
    images: Sequence[Source],
    features: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = ".",
    neighbours: int = COUNT,
) -> Image.Image:
    """Return a contact sheet: each image, then its nearest neighbours in the folder `features`.

    Nearest means the largest cosine of `pooled`. Images are resized as the folder's were. The
    neighbours' files are read under `root`; those that are not found are left blank.

    Raises: ImageError as `draw_pca`; UsageError if `features` is not the finished feature folder of
    this model.
    """
    vectors = open_vectors(features)
    check_model(encoder, vectors.manifest, vectors.folder)
    photographs = take_photographs(encoder, images, options_of(vectors.manifest))
    sheet, _ = neighbour_sheet(photographs, vectors, Path(root), neighbours)
    photographs.refuse_errors()
    return sheet


def options_of(manifest: dict[str, Any]) -> EmbedOptions:
    """Return the options with which the folder's photographs were preprocessed."""
    asked = manifest["preprocessing"]
    return EmbedOptions(
        resize=asked["resize"],
        max_patches=asked["max_patches"],
        max_pixels=asked["max_pixels"],
        token_budget=manifest["token_budget"],
    )


def neighbour_sheet(
    photographs: Photographs, vectors: Vectors, root: Path, neighbours: int, *, width: int = WIDTH
) -> tuple[Image.Image, list[str]]:
    """Return the contact sheet, and the neighbours whose file was not found."""
    queries = {place: one.pooled for place, one in photographs.encode()}
    places = sorted(queries)
    found = nearest(np.stack([queries[place] for place in places]), vectors, neighbours)
    lost: list[str] = []
    panels = [
        Panel(
            (
                Image.fromarray(photographs.pixels(place)),
                *(thumbnail(root, one.id, lost) for one in near),
            ),
            (
                short(photographs, place),
                *(f"{one.score:.3f}  {PurePath(one.id).name}" for one in near),
            ),
            after_first=APART,
        )
        for place, near in zip(places, found, strict=True)
    ]
    title = (
        f"{photographs.source}: left, {count(len(places), 'photograph')}; right, the nearest of "
        f"{vectors.manifest['counts']['ok']:,} by the cosine of their vectors"
    )
    return draw_sheet(title, panels, one_a_line=True, width=width), lost


def nearest(queries: np.ndarray, vectors: Vectors, neighbours: int) -> list[list[Neighbour]]:
    """Return the nearest rows of a feature folder for each query, nearest first.

    Shapes: queries [N, D] -> N lists.
    Raises: UsageError if no row has features, or a file is missing or damaged.
    """
    if not vectors.manifest["counts"]["ok"]:
        raise UsageError(f"{vectors.folder} holds no row with features: all are errors.")
    scores, rows = find_nearest(queries, vectors.blocks(), neighbours, torch.device("cpu"))
    found = np.unique(rows).tolist()
    ids = {row: entry["id"] for row, entry in zip(found, vectors.take(found, ["id"]), strict=True)}
    return [
        [
            Neighbour(ids[row], score)
            for score, row in zip(*near, strict=True)
            if np.isfinite(score)  # there may be fewer rows than neighbours
        ]
        for near in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def thumbnail(root: Path, name: str, lost: list[str]) -> Image.Image:
    """Return the photograph `name` under `root`, or a blank; add missing names to `lost`."""
    try:
        image = load_image(root / name).image
    except ImageError:
        if name not in lost:
            lost.append(name)
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL * 3 // 4), (BLANK,) * 3)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
