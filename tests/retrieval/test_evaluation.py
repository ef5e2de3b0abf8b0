"""k-NN beside scikit-learn's, on its digits written as images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import packvit
from packvit.cli import main
from packvit.corpus.folder.layout import read_manifest, write_manifest
from packvit.retrieval.evaluation import evaluate_knn

TRAIN = 160


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", "knn", *(str(word) for word in argv)])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Features of digits to learn from, and to judge; each lies in a folder named as it is."""
    work = tmp_path_factory.mktemp("digits")
    found: Any = load_digits()
    for number, (image, digit) in enumerate(zip(found.images, found.target, strict=True)):
        if number == 220:
            break
        folder = work / ("train" if number < TRAIN else "test") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 15.9).astype(np.uint8)).resize((42, 42))
        grey.convert("RGB").save(folder / f"{number:04d}.png")
    for half in ("train", "test"):
        packvit.embed(work / half, out=work / f"{half}.out", model="tiny", device="cpu")
    return work / "train.out", work / "test.out"


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = packvit.read(folder)
    return rows.matrix, np.array([name.split("/")[0] for name in rows.ids])


def voters(neighbours: int) -> KNeighborsClassifier:
    weights: Any = weigh
    return KNeighborsClassifier(neighbours, weights=weights, metric="cosine")


def weigh(distances: np.ndarray) -> np.ndarray:
    return np.exp((1 - distances) / 0.07)


def test_accuracy_is_that_of_scikit_learns_weighted_votes(digits: tuple[Path, Path]):
    train, test = digits
    votes = voters(20).fit(*read(train))
    vectors, truth = read(test)
    likely = votes.predict_proba(vectors)
    found = evaluate_knn(test, train=train, device="cpu")
    assert found.top1 == (votes.classes_[likely.argmax(1)] == truth).mean()
    best = votes.classes_[np.argsort(-likely, axis=1, kind="stable")[:, :5]]
    assert found.top5 == (best == truth[:, None]).any(1).mean()
    assert (found.rows, found.classes, found.left_out) == (60, 10, 0)
    assert 0.5 < found.top1 < 1


def test_without_a_folder_to_learn_from_each_row_is_judged_by_all_others(digits: tuple[Path, Path]):
    train, _ = digits
    vectors, truth = read(train)
    right = 0
    for row in range(len(vectors)):
        rest = np.arange(len(vectors)) != row
        votes = voters(5)
        right += votes.fit(vectors[rest], truth[rest]).predict(vectors[[row]])[0] == truth[row]
    assert evaluate_knn(train, neighbours=5, device="cpu").top1 == right / len(vectors)


def test_labels_may_come_from_a_table(tmp_path: Path, digits: tuple[Path, Path]):
    _, test = digits
    every = packvit.read(test)
    ids = every.ids[:50]
    odd = ["odd" if int(name[0]) % 2 else "even" for name in ids]
    pq.write_table(pa.table({"id": ids, "parity": odd}), tmp_path / "labels.parquet")
    found = evaluate_knn(
        test, labels=tmp_path / "labels.parquet", label="parity", neighbours=3, device="cpu"
    )
    assert (found.rows, found.left_out, found.classes) == (50, 10, 2)
    votes = voters(3)
    right = 0
    for row in range(50):
        rest = np.arange(50) != row
        votes.fit(every.matrix[:50][rest], np.array(odd)[rest])
        right += votes.predict(every.matrix[[row]])[0] == odd[row]
    assert found.top1 == right / 50


def test_what_the_authors_print_stands_beside_it(tmp_path: Path, digits: tuple[Path, Path]):
    train, test = digits
    result = invoke(test, "--train", train, "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "published" not in result.stdout
    for folder in digits:
        manifest = read_manifest(folder)
        assert manifest
        write_manifest(folder, manifest | {"model": "facebook/dinov2-base"})
    shown = invoke(test, "--train", train, "--device", "cpu").stdout
    assert shown.startswith("knn of facebook/dinov2-base: 60 photographs, 10 labels\ntop-1  ")
    assert "published top-1 of this model on ImageNet-1k  82.1%\n" in shown
    found = json.loads(invoke(test, "--train", train, "--device", "cpu", "--json").stdout)
    assert (found["published"], found["rows"]) == (82.1, 60)


def test_a_mistake_is_answered_in_a_sentence(tmp_path: Path, digits: tuple[Path, Path]):
    _, test = digits
    for argv, answer in (
        ((tmp_path,), "is not a feature folder"),
        ((test, "--label", "colour"), 'has no column "colour"'),
        ((test, "--labels", tmp_path / "gone.parquet"), "cannot be read as a Parquet file"),
        ((test, "--temperature", "0"), "but both must be above 0"),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr, argv
