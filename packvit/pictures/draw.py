"""Draw the picture of `packvit pca` and write it to a file.

Wrong arguments are refused before the model is loaded, if possible.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from packvit.atomic import write_whole
from packvit.config import GridPolicy
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.rows import Row
from packvit.corpus.inputs.addresses import check_local
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Input
from packvit.corpus.job import MOST_WORKERS, count_cpus
from packvit.corpus.loading import load_encoder
from packvit.corpus.progress import Tally, Tell
from packvit.corpus.settings import EmbedOptions, ModelChoice
from packvit.images.resize import Resize
from packvit.model.options import LoadOptions
from packvit.pictures.maps import Background, pca_sheet, similarity_sheet
from packvit.pictures.neighbours import COUNT, neighbour_sheet, options_of
from packvit.pictures.sheet import WIDTH
from packvit.pictures.tokens import NothingToDraw, read_photographs
from packvit.retrieval.folders import open_vectors
from packvit.retrieval.models import check_model

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 90  # of a JPEG or WebP, with colour at full resolution: patches keep their edges


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn picture: its photographs, those that could not be read, and (width, height)."""

    photographs: int
    errors: list[Row]
    lost: list[str]  # neighbours whose file was not found
    size: tuple[int, int]


def draw(
    photos: Sequence[str],
    *,
    out: str,
    model: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    positions: GridPolicy = "checkpoint",
    resize: Resize | None = None,
    max_patches: int | None = None,
    layer: int | None = None,
    per_image: bool = False,
    background: Background = "keep",
    overlay: bool = False,
    similar_to: str | None = None,
    neighbours: str | None = None,
    root: str = ".",
    count: int = COUNT,
    width: int = WIDTH,
    progress: Tell | None = None,
) -> Drawn:
    """Write a picture of photographs to `out`, unless none can be read.

    `neighbours` takes the model, and how photographs are resized, from that feature folder.

    Raises: UsageError for arguments that cannot be used; CheckpointError; WriteError.
    """
    check_together(
        {
            "--similar-to": similar_to is not None,
            "--neighbours": neighbours is not None,
            "--per-image": per_image,
            "--background remove": background == "remove",
            "--layer": layer is not None,
            "--overlay": overlay,
            "--resize": resize is not None,
            "--max-patches": max_patches is not None,
            "--positions interpolate": positions == "interpolate",
        }
    )
    inputs = list(list_inputs(photos))
    target = check_out(out, inputs)
    patch = find_patch(inputs, similar_to) if similar_to is not None else None
    options = EmbedOptions(resize=resize, max_patches=max_patches)
    vectors = open_vectors(neighbours) if neighbours is not None else None
    if vectors is not None:
        manifest = vectors.manifest
        model, revision = model or manifest["model"], revision or manifest["revision"]
        options, positions = options_of(manifest), manifest["positions"]
    loading = LoadOptions(device=device, positions=positions)
    encoder, _ = load_encoder(ModelChoice(model=model, revision=revision, options=loading))
    if vectors is not None:
        check_model(encoder, vectors.manifest, vectors.folder)
    tally = Tally(len(inputs), progress)
    options = replace(options, workers=min(MOST_WORKERS, count_cpus()))
    photographs = read_photographs(encoder, inputs, options, tally.settle, layer=layer)
    lost: list[str] = []
    try:
        if vectors is not None:
            sheet, lost = neighbour_sheet(photographs, vectors, Path(root), count, width=width)
        elif patch:
            sheet = similarity_sheet(photographs, patch, overlay=overlay, width=width)
        else:
            sheet = pca_sheet(
                photographs,
                per_image=per_image,
                background=background,
                overlay=overlay,
                width=width,
            )
    except NothingToDraw:
        return Drawn(0, photographs.errors, lost, (0, 0))
    write_picture(sheet, target)
    return Drawn(len(photographs.usable), photographs.errors, lost, sheet.size)


def check_together(asked: dict[str, bool]) -> None:
    """Refuse options that exclude each other.

    Raises: UsageError naming two of them.
    """
    idle = {
        "--similar-to": ("--neighbours", "--per-image", "--background remove"),
        "--neighbours": (
            *("--per-image", "--background remove", "--layer", "--overlay"),
            *("--resize", "--max-patches", "--positions interpolate"),
        ),
    }
    for kind, others in idle.items():
        for other in others:
            if asked[kind] and asked[other]:
                raise UsageError(
                    f"{other} cannot be combined with {kind}. Leave one of the two out."
                )


def check_out(out: str, inputs: Sequence[Input]) -> Path:
    """Return the path of the picture.

    Raises: UsageError if it has another suffix, or if it would replace another file.
    """
    check_local(out, name="--out")
    target = Path(out)
    if target.suffix.lower() not in FORMATS:
        raise UsageError(f"--out is {out}, but must end in {', '.join(FORMATS)}.")
    if not target.parent.is_dir():
        raise UsageError(
            f"--out is {out}, but the folder {target.parent} does not exist. Create it first."
        )
    if not os.path.lexists(target):
        return target
    if any(one.error is None and os.path.samefile(one.path, target) for one in inputs):
        raise UsageError(f"--out is {out}, which is one of the photographs. Choose another name.")
    try:
        with Image.open(target):
            return target
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{out} exists and is not a picture. Choose another name.") from error


def find_patch(inputs: Sequence[Input], named: str) -> tuple[int, int, int]:
    """Return (index of the photograph, row, column) of PHOTO:ROW,COLUMN.

    Raises: UsageError if it has another form, or names none of the photographs.
    """
    photo, _, numbers = named.rpartition(":")
    row, _, column = numbers.partition(",")
    if not (photo and row.strip().isdecimal() and column.strip().isdecimal()):
        raise UsageError(
            f'--similar-to is "{named}", but must be PHOTO:ROW,COLUMN, for example cat.jpg:12,20. '
            "Rows and columns count patches from the upper left, from 0."
        )
    path = os.path.abspath(photo)
    for place, one in enumerate(inputs):
        if one.id == photo or os.path.abspath(one.path) == path:
            return place, int(row), int(column)
    raise UsageError(
        f"--similar-to names {photo}, which is not one of the {len(inputs)} photographs."
    )


def write_picture(sheet: Image.Image, target: Path) -> None:
    """Write a picture atomically, in the format of its suffix.

    Raises: WriteError if it cannot be written.
    """
    kind, data = FORMATS[target.suffix.lower()], BytesIO()
    if kind == "JPEG":
        sheet.save(data, kind, quality=QUALITY, subsampling=0, optimize=True)
    elif kind == "WEBP":
        sheet.save(data, kind, quality=QUALITY)
    else:
        sheet.save(data, kind)
    try:
        write_whole(target, data.getvalue())
    except OSError as error:
        raise WriteError(f"{target} could not be written: {error.strerror}.") from error
