"""Labels without training: every photograph's cosine to the words of each label.

A label's vector is the mean of the unit vectors of its templates, as CLIP's authors do it. The
model decides what scores mean: CLIP's sum to 1 over the labels, SigLIP's judge each label by
itself.

Source: arXiv:2103.00020, section 3.1.4; arXiv:2303.15343, whose authors use the same templates.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from packvit.atomic import replacing
from packvit.corpus import UsageError
from packvit.corpus.inputs.addresses import check_local
from packvit.retrieval.folders import Vectors, open_vectors, unwritable
from packvit.retrieval.models import load_words, read_words, word_column
from packvit.text.encoder import TextEncoder

# Seven of CLIP's eighty, which its authors chose for ImageNet in the notebook beside their code.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
SUFFIXES = (".parquet", ".csv")
SCORES = 100  # labels at most whose scores are all written


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """The labels of a folder's photographs, the best of each, and how many were labelled."""

    labels: tuple[str, ...]
    counts: dict[str, int]  # photographs by their best label
    rows: int
    errors: int  # rows without a vector
    out: Path


def zeroshot(
    folder: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    out: str | os.PathLike[str],
    templates: Sequence[str] = TEMPLATES,
    model: str | None = None,
    device: str | None = None,
) -> Labelled:
    """Write a table of the best label of every photograph; the folder itself is not changed.

    The table has a row for each of the folder's, in their order: `id`, `label`, `score` and the
    `cosine` of the label, null where the row is an error, and in Parquet `scores`, those of all
    labels in the order that the schema's metadata gives, of up to 100 labels.

    Raises: UsageError for arguments that cannot be used or a model without a text tower;
    CheckpointError; WriteError.
    """
    target = check_table(out)
    plain = open_vectors(folder)
    vectors = open_vectors(folder, word_column(plain))
    tower = load_words(vectors, model, device)
    classes = embed_labels(tower, labels, templates)
    return write_labels(vectors, tower, labels, classes, target)


def write_labels(
    vectors: Vectors, tower: TextEncoder, labels: Sequence[str], classes: Tensor, target: Path
) -> Labelled:
    """Write the table of the labels, whose vectors are `classes` [L, E]."""
    counts = np.zeros(len(labels), np.int64)
    errors = 0
    with (
        unwritable(target),
        replacing(target) as (temporary,),
        table_writer(temporary, target.suffix.lower(), labels) as writer,
    ):
        for number in range(vectors.count):
            ids = vectors.ids(number)
            block = vectors.read_part(number)
            logits, scores = score(tower, block, classes)
            good = np.asarray(np.isfinite(logits).all(axis=1))
            best = np.argmax(np.where(good[:, None], logits, 0), axis=1)
            cosines = best_cosines(block, classes.cpu().numpy(), best)
            counts += np.bincount(best[good], minlength=len(labels))
            errors += int((~good).sum())
            writer.write(to_table(ids, labels, good, best, scores, cosines))
    return Labelled(
        tuple(labels),
        dict(zip(labels, counts.tolist(), strict=True)),
        len(vectors),
        errors,
        target,
    )


def check_table(out: str | os.PathLike[str]) -> Path:
    """Return the path of a table.

    Raises: UsageError if its suffix is no table's, or its folder is not there.
    """
    check_local(out)
    target = Path(out)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"out is {target}, but must end in {' or '.join(SUFFIXES)}.")
    if not target.parent.is_dir():
        raise UsageError(f"out is {target}, but the folder {target.parent} does not exist.")
    return target


def read_labels(given: str) -> list[str]:
    """Return the labels in a text with commas between them, or in the lines of a file.

    Raises: UsageError for none, or one twice, a file that is no text, or one that is not there.
    """
    is_file = os.path.isfile(given)
    if not is_file and given.lower().endswith((".txt", ".csv")) and "," not in given:
        raise UsageError(f"{given} is called like a file of labels, but there is no such file.")
    try:
        text = Path(given).read_text("utf-8-sig") if is_file else given.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given} cannot be read as a text of one label a line.") from error
    labels = [line.strip() for line in text.splitlines() if line.strip()]
    check_labels(labels)
    return labels


def check_labels(labels: Sequence[str]) -> None:
    """Refuse an empty list of labels, and a label that is given twice.

    Raises: UsageError.
    """
    if not labels:
        raise UsageError('labels is empty. Give some, such as "a cat,a dog", or a file of them.')
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UsageError(f'labels names "{twice}" twice. Give each label once.')


def embed_labels(
    tower: TextEncoder, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Return the unit vector of each label: of the mean of its templates' unit vectors.

    Shapes: L labels -> [L, E].
    Raises: UsageError for a template without {}, or a label that the tower cannot read.
    """
    check_labels(labels)
    if not templates or any("{}" not in template for template in templates):
        raise UsageError(
            'templates is empty, or one has no {} for the label, as "a photo of a {}."'
        )
    texts = [template.replace("{}", label) for label in labels for template in templates]
    read_words(tower, labels)
    found = torch.from_numpy(tower.embed(texts)).view(len(labels), len(templates), -1)
    unit = torch.nn.functional.normalize(found, dim=-1)
    return torch.nn.functional.normalize(unit.mean(dim=1), dim=-1).to(tower.device)


def score(
    tower: TextEncoder, vectors: np.ndarray, classes: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return how well labels fit rows: the model's logits and its probabilities; NaN for no vector.

    Shapes: vectors [N, E], classes [L, E] -> float32 [N, L] twice.
    """
    with torch.inference_mode():
        images = torch.tensor(vectors, dtype=torch.float32, device=tower.device)
        logits = tower.logits(images, classes)
        return logits.cpu().numpy(), tower.judge(logits).cpu().numpy()


def best_cosines(vectors: np.ndarray, classes: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Return the cosine of each row to its best label. Shapes: [N, E], [L, E], [N] -> [N]."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return np.einsum("nd,nd->n", vectors, classes[best]) / norms


def to_table(
    ids: pa.Array,
    labels: Sequence[str],
    good: np.ndarray,
    best: np.ndarray,
    scores: np.ndarray,
    cosines: np.ndarray,  # to the best label
) -> pa.Table:
    """Return rows of the table of labels."""
    rows = np.arange(len(best))
    bad = ~good
    named = pa.DictionaryArray.from_arrays(
        pa.array(best.astype(np.int32), mask=bad), pa.array(list(labels))
    )
    columns = {
        "id": ids,
        "label": named.cast(pa.string()),
        "score": pa.array(scores[rows, best], pa.float32(), mask=bad),
        "cosine": pa.array(cosines, pa.float32(), mask=bad),
    }
    if len(labels) <= SCORES:
        flat = pa.array(np.where(bad[:, None], 0, scores).reshape(-1), pa.float32())
        columns["scores"] = pa.FixedSizeListArray.from_arrays(
            flat, type=pa.list_(pa.float32(), len(labels)), mask=pa.array(bad)
        )
    return pa.table(columns)


class Writer:
    """Writes tables of labels to one file, Parquet or CSV."""

    def __init__(self, path: Path, suffix: str, labels: Sequence[str]) -> None:
        self.path, self.suffix, self.labels = path, suffix, labels
        self.writer: pq.ParquetWriter | csv.CSVWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Write rows; CSV takes no lists."""
        if self.suffix == ".csv":
            table = table.select(["id", "label", "score", "cosine"])
        else:
            table = table.replace_schema_metadata({"labels": json.dumps(list(self.labels))})
        if self.writer is None:
            kind = csv.CSVWriter if self.suffix == ".csv" else pq.ParquetWriter
            self.writer = kind(str(self.path), table.schema)
        self.writer.write_table(table)


@contextmanager
def table_writer(path: Path, suffix: str, labels: Sequence[str]) -> Iterator[Writer]:
    """Yield a writer of the table of labels, which is closed at the end."""
    writer = Writer(path, suffix, labels)
    try:
        yield writer
    finally:
        if writer.writer is not None:
            writer.writer.close()
