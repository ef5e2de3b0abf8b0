"""The numbers that papers print of a model: k-NN and zero-shot accuracy on labelled photographs.

k-NN is DINOv2's protocol: cosine, the 20 nearest, votes weighted by exp(cosine / 0.07).

Source: arXiv:2304.07193, section 7.1; facebookresearch/dinov2, eval/knn.py.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from packvit.corpus import UsageError
from packvit.retrieval.folders import Vectors, open_vectors
from packvit.retrieval.models import load_words, word_column
from packvit.retrieval.nearest import QUERIES, choose_device, find_nearest
from packvit.retrieval.search import ON_GPU
from packvit.retrieval.zeroshot import TEMPLATES, embed_labels, score

NEIGHBOURS, TEMPERATURE = 20, 0.07

# Accuracy in percent on ImageNet-1k's validation set. Source: facebookresearch/dinov2, README.md.
PUBLISHED_KNN = {
    "facebook/dinov2-small": 79.0,
    "facebook/dinov2-base": 82.1,
    "facebook/dinov2-large": 83.5,
    "facebook/dinov2-giant": 83.5,
    "facebook/dinov2-with-registers-small": 79.1,
    "facebook/dinov2-with-registers-base": 82.0,
    "facebook/dinov2-with-registers-large": 83.8,
    "facebook/dinov2-with-registers-giant": 83.7,
}
# Source: CLIP: arXiv:2103.00020, table 11; open_clip's README repeats the first three ("in paper"),
# section 3.1.3 the last, of the paper's best model. SigLIP2: google-research/big_vision,
# README_siglip2.md, column "INet 0-shot"; NaFlex at 256 patches.
PUBLISHED_ZEROSHOT = {
    "openai/clip-vit-base-patch32": 63.2,
    "openai/clip-vit-base-patch16": 68.6,
    "openai/clip-vit-large-patch14": 75.3,
    "openai/clip-vit-large-patch14-336": 76.2,
    "google/siglip2-base-patch16-224": 78.2,
    "google/siglip2-base-patch16-256": 79.1,
    "google/siglip2-base-patch16-384": 80.6,
    "google/siglip2-base-patch16-512": 81.2,
    "google/siglip2-base-patch32-256": 74.0,
    "google/siglip2-large-patch16-256": 82.5,
    "google/siglip2-large-patch16-384": 83.1,
    "google/siglip2-large-patch16-512": 83.5,
    "google/siglip2-so400m-patch14-224": 83.2,
    "google/siglip2-so400m-patch14-384": 84.1,
    "google/siglip2-so400m-patch16-256": 83.4,
    "google/siglip2-so400m-patch16-384": 84.1,
    "google/siglip2-so400m-patch16-512": 84.3,
    "google/siglip2-giant-opt-patch16-256": 84.5,
    "google/siglip2-giant-opt-patch16-384": 85.0,
    "google/siglip2-base-patch16-naflex": 78.5,
    "google/siglip2-so400m-patch16-naflex": 83.5,
}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of rows whose best label, or one of whose best five, is right."""

    model: str
    top1: float
    top5: float
    rows: int  # that were judged
    left_out: int  # rows without a vector or a label
    classes: int
    published: float | None  # in percent, on ImageNet-1k, of the model of this name


def evaluate_knn(
    folder: str | os.PathLike[str],
    *,
    train: str | os.PathLike[str] | None = None,
    label: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: str | None = None,
) -> Accuracy:
    """Return the accuracy of weighted votes of the nearest photographs in the folder `train`.

    Without one, each row is judged by all other rows of its own folder. A row's label is the first
    folder of its id, or the column `label` of the feature folder, or of the Parquet file `labels`,
    which has the columns `id` and `label`.

    Raises: UsageError for arguments that cannot be used, or folders of different models.
    """
    if neighbours < 1 or not temperature > 0:
        raise UsageError(
            f"neighbours is {neighbours} and temperature {temperature:g}, but both must be above 0."
        )
    where = choose_device(device)
    test = open_vectors(folder)
    base = test if train is None else open_vectors(train)
    if base.manifest["weights_sha256"] != test.manifest["weights_sha256"]:
        raise UsageError(
            f'{base.folder} comes from the model "{base.manifest["model"]}" and {test.folder} from '
            f'"{test.manifest["model"]}". Embed both with one model.'
        )
    known = label_rows(base, label, labels)
    wanted = known if base is test else label_rows(test, label, labels)
    classes, codes = np.unique([each for each in known if each is not None], return_inverse=True)
    numbers = np.full(len(base), -1)
    numbers[[each is not None for each in known]] = codes
    place = {each: number for number, each in enumerate(classes.tolist())}
    truth = np.array([place.get(each, -1 if each is None else len(place)) for each in wanted])
    return count_votes(
        test, base, truth, numbers, len(classes), neighbours, temperature, where, test is base
    )


def count_votes(
    test: Vectors,
    base: Vectors,
    truth: np.ndarray,
    numbers: np.ndarray,
    classes: int,
    neighbours: int,
    temperature: float,
    device: torch.device,
    leave_out: bool,
) -> Accuracy:
    """Return the accuracy of votes of `base` rows of classes `numbers`; -1 is no class.

    Shapes: truth [rows of test], numbers [rows of base].
    """
    right1 = right5 = judged = 0
    size = ON_GPU if device.type != "cpu" else None
    labelled = numbers >= 0
    for start, queries in test.blocks(QUERIES):
        rows = np.arange(start, start + len(queries))
        norms = np.linalg.norm(queries, axis=1)
        good = np.isfinite(norms) & (norms > 0) & (truth[rows] >= 0)
        if not good.any():
            continue
        blocks = base.blocks() if size is None else base.blocks(size)
        kept = (
            (first, np.where(labelled[first : first + len(block), None], block, np.nan))
            if not labelled[first : first + len(block)].all()
            else (first, block)
            for first, block in blocks
        )
        top = min(neighbours + leave_out, len(base))
        cosines, near = find_nearest(queries[good], kept, top, device)
        weights = np.exp(cosines / temperature)  # 0 where there is no neighbour
        if leave_out:
            weights[near == rows[good][:, None]] = 0
            extra = (weights > 0).sum(axis=1) > neighbours  # itself was not among them
            weights[extra, -1] = 0
        votes = np.zeros((len(near), classes + 1))
        np.add.at(votes, (np.arange(len(near))[:, None], numbers[near]), weights)
        order = np.argsort(-votes[:, :classes], axis=1, kind="stable")
        hits = order[:, :5] == truth[rows[good]][:, None]
        right1 += int(hits[:, 0].sum())
        right5 += int(hits.any(axis=1).sum())
        judged += int(good.sum())
    return accuracy(test, right1, right5, judged, classes, PUBLISHED_KNN)


def evaluate_zeroshot(
    folder: str | os.PathLike[str],
    *,
    label: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    words: Callable[[str], str] = lambda name: name.replace("_", " "),
    model: str | None = None,
    device: str | None = None,
) -> Accuracy:
    """Return the accuracy of the words of all labels on labelled photographs.

    Labels are those of the rows, as `evaluate_knn` finds them; `words` makes the words of one.

    Raises: UsageError for arguments that cannot be used, or a model without a text tower;
    CheckpointError.
    """
    plain = open_vectors(folder)
    vectors = open_vectors(folder, word_column(plain))
    found = label_rows(vectors, label, labels)
    names = sorted({each for each in found if each is not None})
    tower = load_words(vectors, model, device)
    classes = embed_labels(tower, [words(name) for name in names], templates)
    place = {name: number for number, name in enumerate(names)}
    truth = np.array([-1 if each is None else place[each] for each in found])
    right1 = right5 = judged = 0
    for start, block in vectors.blocks():
        logits, _ = score(tower, block, classes)
        wanted = truth[start : start + len(block)]
        good = np.isfinite(logits).all(axis=1) & (wanted >= 0)
        order = np.argsort(-logits[good], axis=1, kind="stable")
        hits = order[:, :5] == wanted[good][:, None]
        right1 += int(hits[:, 0].sum())
        right5 += int(hits.any(axis=1).sum())
        judged += int(good.sum())
    return accuracy(vectors, right1, right5, judged, len(names), PUBLISHED_ZEROSHOT)


def accuracy(
    vectors: Vectors,
    right1: int,
    right5: int,
    judged: int,
    classes: int,
    published: dict[str, float],
) -> Accuracy:
    """Return shares of what was judged.

    Raises: UsageError if nothing was.
    """
    if not judged:
        raise UsageError(f"{vectors.folder} holds no row with both features and a label.")
    name = str(vectors.manifest["model"])
    return Accuracy(
        name,
        right1 / judged,
        right5 / judged,
        judged,
        len(vectors) - judged,
        classes,
        published.get(name),
    )


def label_rows(
    vectors: Vectors, label: str | None, labels: str | os.PathLike[str] | None
) -> list[str | None]:
    """Return the label of each row, None where there is none.

    Raises: UsageError for a column that is not there, or rows that lie in no folder.
    """
    if labels is not None:
        given = read_label_file(Path(labels), label or "label")
        return [given.get(name) for name in vectors.table(["id"])["id"].to_pylist()]
    if label is not None:
        try:
            column = vectors.table([label])[label]
        except (KeyError, pa.ArrowInvalid, UsageError) as error:
            raise UsageError(
                f'{vectors.folder} has no column "{label}". Keep it when embedding, '
                "or give `labels`, a Parquet file with the columns id and label."
            ) from error
        return [None if each is None else str(each) for each in column.to_pylist()]
    names = [PurePosixPath(name).parts for name in vectors.table(["id"])["id"].to_pylist()]
    if not any(len(parts) > 1 for parts in names):
        raise UsageError(
            f"The photographs of {vectors.folder} lie in no sub-folders that could name their "
            "labels. Give `label`, a column, or `labels`, a Parquet file of ids and labels."
        )
    return [parts[0] if len(parts) > 1 else None for parts in names]


def read_label_file(path: Path, column: str) -> dict[str, str]:
    """Return the labels in a Parquet file by id.

    Raises: UsageError if it cannot be read, or has no such columns.
    """
    try:
        table = pq.read_table(path, columns=["id", column])
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{path} cannot be read as a Parquet file with the columns id and {column}."
        ) from error
    if table.column_names != ["id", column]:
        raise UsageError(f"{path} has no column id or no column {column}.")
    pairs = zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True)
    return {str(name): str(label) for name, label in pairs if label is not None}
