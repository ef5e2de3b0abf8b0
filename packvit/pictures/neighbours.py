"""A contact sheet of photographs and their nearest neighbours in a feature folder."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_commits, read_manifest
from packvit.corpus.folder.names import CURRENT, FORMATS
from packvit.corpus.loading import digest_weights
from packvit.corpus.settings import EmbedOptions
from packvit.encoder import Encoder
from packvit.images.decode import ImageError, Source, load_image
from packvit.pictures.colours import BLANK
from packvit.pictures.maps import count, short, unit
from packvit.pictures.sheet import APART, WIDTH, Panel, draw_sheet
from packvit.pictures.tokens import Photographs, take_photographs

COUNT = 6
BATCH = 4096  # rows of a part that are held at once: 16 MiB at a width of 1024
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

    Raises: ImageError as `draw_pca`; UsageError if `features` is not a feature folder of this
    model.
    """
    folder = Path(features)
    manifest = open_folder(folder)
    check_model(encoder, manifest, folder)
    photographs = take_photographs(encoder, images, options_of(manifest))
    sheet, _ = neighbour_sheet(photographs, folder, Path(root), neighbours)
    photographs.refuse_errors()
    return sheet


def open_folder(folder: Path) -> dict[str, Any]:
    """Return the manifest of a feature folder.

    Raises: UsageError if it is not one.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("format") not in FORMATS:
        raise UsageError(
            f"{folder} is not a feature folder: it has no {CURRENT.manifest} of packvit. "
            "Name one that `packvit embed` wrote."
        )
    return manifest


def options_of(manifest: dict[str, Any]) -> EmbedOptions:
    """Return the options with which the folder's photographs were preprocessed."""
    asked = manifest["preprocessing"]
    return EmbedOptions(
        resize=asked["resize"],
        max_patches=asked["max_patches"],
        max_pixels=asked["max_pixels"],
        token_budget=manifest["token_budget"],
    )


def check_model(encoder: Encoder, manifest: dict[str, Any], folder: Path) -> None:
    """Raise UsageError unless the folder's features come from the encoder's weights."""
    known = {digest_weights(encoder)}
    if encoder.checkpoint:
        known.add(encoder.checkpoint.sha256())
    if manifest["weights_sha256"] not in known:
        mine = encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__
        raise UsageError(
            f'The features in {folder} come from the model "{manifest["model"]}", and "{mine}" has '
            "other weights, so they cannot be compared. Leave `model` out, or embed the folder's "
            "photographs again."
        )


def neighbour_sheet(
    photographs: Photographs, folder: Path, root: Path, neighbours: int, *, width: int = WIDTH
) -> tuple[Image.Image, list[str]]:
    """Return the contact sheet, and the neighbours whose file was not found."""
    queries = {place: one.pooled for place, one in photographs.encode()}
    places = sorted(queries)
    found, rows = nearest(np.stack([queries[place] for place in places]), folder, neighbours)
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
        f"{rows:,} by the cosine of their vectors"
    )
    return draw_sheet(title, panels, one_a_line=True, width=width), lost


def nearest(
    queries: np.ndarray, folder: Path, neighbours: int
) -> tuple[list[list[Neighbour]], int]:
    """Return the nearest rows of a feature folder for each query, and how many rows there are.

    Shapes: queries [N, D] -> N lists, nearest first; ties go to the earlier row.
    Raises: UsageError if no row has features, or if they have another width.
    """
    wanted, rows = unit(queries), 0
    best: list[list[Neighbour]] = [[] for _ in queries]
    for ids, vectors in read_vectors(folder):
        if vectors.shape[1] != queries.shape[1]:
            raise UsageError(
                f"The vectors in {folder} have {vectors.shape[1]} dimensions, and those of the "
                f"photographs {queries.shape[1]}. Use the model that wrote the folder."
            )
        rows += len(ids)
        for place, scores in enumerate(wanted @ unit(vectors).T):
            top = np.argsort(-scores, kind="stable")[:neighbours]
            merged = best[place] + [Neighbour(ids[i], float(scores[i])) for i in top]
            best[place] = sorted(merged, key=lambda one: -one.score)[:neighbours]
    if not rows:
        raise UsageError(f"{folder} holds no row with features. Run its embed command first.")
    return best, rows


def read_vectors(folder: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the ids and vectors [rows, D] of a feature folder in batches, without error rows.

    Only parts that the log lists are read.
    """
    for entry in read_commits(folder):
        try:
            with (
                pa.OSFile(os.fsencode(folder / entry.part)) as file,
                pq.ParquetFile(file, page_checksum_verification=True) as part,
            ):
                columns = ["id", "status", "pooled"]
                for batch in part.iter_batches(BATCH, columns=columns):
                    good = batch.filter(pa.array(batch["status"].to_numpy(False) == "ok"))
                    if len(good):
                        vectors = good["pooled"].flatten().to_numpy()
                        yield good["id"].to_pylist(), vectors.reshape(len(good), -1)
        except (OSError, pa.ArrowInvalid) as error:
            raise UsageError(
                f"{folder / entry.part} is missing or damaged. `packvit check {folder}` says how "
                "to repair it."
            ) from error


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
