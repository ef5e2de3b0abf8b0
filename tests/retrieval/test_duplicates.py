import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

import packvit
from benchmarks.drawn import drawn_rows, write_folder
from benchmarks.duplicates import measure
from demo.photographs import photographs
from packvit.cli import main
from packvit.corpus import UsageError
from packvit.retrieval import pairs as pairs_module
from packvit.retrieval.duplicates import find_duplicates
from packvit.retrieval.linkage import group_pairs
from packvit.retrieval.pairs import choose_basis, find_pairs

CPU = torch.device("cpu")


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(main, ["dups", *(str(word) for word in argv)])


def unit(rows: int, width: int, *, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((rows, width)) + 1  # a common direction, as features have
    near = draw.integers(0, rows, rows // 3)
    vectors[: len(near)] = vectors[near] + spread * draw.standard_normal((len(near), width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def quiet(done: int, rows: int) -> None:
    assert done <= rows


def assert_pairs_are_those_of_float64(vectors: np.ndarray, threshold: float) -> int:
    wide = vectors.astype(np.float64)
    cosines = np.einsum("nd,md->nm", wide, wide)  # in one order of sums, whatever the rows
    left, right = np.nonzero(np.triu(cosines >= threshold, 1))
    found = find_pairs(vectors, threshold, CPU, quiet)
    assert np.array_equal(found.left, left)
    assert np.array_equal(found.right, right)
    np.testing.assert_allclose(found.scores, cosines[left, right], atol=1e-12)
    return len(left)


@pytest.mark.parametrize(("width", "threshold"), [(5, 0.9), (48, 0.8), (200, 0.95)])
def test_pairs_are_all_that_reach_the_threshold(width: int, threshold: float):
    assert assert_pairs_are_those_of_float64(unit(1500, width, spread=0.3), threshold) > 100


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 300),
    width=st.sampled_from([1, 2, 17, 64, 130]),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
    cone=st.sampled_from([0.0, 1.0, 30.0]),
    clusters=st.sampled_from([1, 5, 300]),
    gap=st.sampled_from([0.0, 1e-7, 1e-4, 0.02, 1.0]),
    share=st.sampled_from([0.01, 0.5, 0.9]),
)
def test_no_pair_is_lost_whatever_shape_the_vectors_have(
    seed: int,
    rows: int,
    width: int,
    decay: float,
    cone: float,
    clusters: int,
    gap: float,
    share: float,
):
    """The threshold is a cosine of the vectors themselves, so that rounding would decide."""
    draw = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -decay
    centres = draw.standard_normal((clusters, width)) + cone
    vectors = centres[draw.integers(0, clusters, rows)]
    vectors = (vectors + gap * draw.standard_normal((rows, width))) * spectrum
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
    vectors = vectors.astype(np.float32)
    wide = vectors.astype(np.float64)
    cosines = np.einsum("nd,md->nm", wide, wide)[np.triu_indices(rows, 1)]
    nth = np.quantile(cosines, share, method="lower") if len(cosines) else 0.9
    threshold = float(nth) - 1e-12
    assume(0 < threshold <= 1)
    assert_pairs_are_those_of_float64(vectors, threshold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pair_whose_residuals_alone_differ_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    """Rows lie in the basis but for two, of which one hardly leaves it."""
    monkeypatch.setattr(pairs_module, "choose_dtype", lambda *_: dtype)
    vectors = np.zeros((6000, 40), np.float32)
    vectors[:, :4] = np.random.default_rng(0).standard_normal((6000, 4))
    vectors[17, 20], vectors[4017, 20] = 2e-4, 0.3
    vectors[4017, :4] = vectors[17, :4]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    threshold = float(vectors[17].astype(np.float64) @ vectors[4017].astype(np.float64)) - 1e-12
    found = find_pairs(vectors, threshold, CPU, quiet)
    assert (17, 4017) in zip(found.left.tolist(), found.right.tolist(), strict=True)


def test_few_dimensions_rule_out_most_pairs_where_they_can():
    assert choose_basis(unit(3000, 256, spread=0.1), 0.95).shape[1] < 128
    assert choose_basis(unit(3000, 256, spread=0.1), 0.3).shape[1] == 256


def test_groups_are_scipys_complete_linkage():
    for seed, threshold in ((0, 0.9), (1, 0.8), (2, 0.6)):
        vectors = unit(400, 12, seed=seed, spread=0.5).astype(np.float64)
        found = group_pairs(find_pairs(vectors.astype(np.float32), threshold, CPU, quiet))
        labels = fcluster(linkage(pdist(vectors, "cosine"), "complete"), 1 - threshold, "distance")
        expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        assert found == sorted(group for group in expected if len(group) > 1)
        assert max(map(len, found)) > 2


def test_a_chain_of_which_only_neighbours_are_alike_is_not_one_group(tmp_path: Path):
    angles = np.arange(200) * 0.1  # neighbours: cosine 0.995; ends far apart
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    folder = write_folder(tmp_path / "chain", [(drawn_rows(0, 60), vectors[:60])], 2)
    found = find_duplicates(folder, threshold=0.99, pixels=False)
    assert found.groups
    for group in found.groups:
        rows = [int(member.id[-13:-4]) for member in group]
        for a, b in combinations(rows, 2):
            assert vectors[a] @ vectors[b] >= 0.99


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_and_rows_without_a_vector_are_no_groups(tmp_path: Path, rows: int):
    vectors = np.random.default_rng(1).standard_normal((rows, 8)).astype(np.float32)
    blank = np.full_like(vectors, np.nan)
    for name, drawn in (("few", vectors), ("broken", blank), ("zero", np.zeros_like(vectors))):
        folder = write_folder(tmp_path / name, [(drawn_rows(0, rows), drawn)], 8)
        found = find_duplicates(folder, pixels=False)
        assert (found.groups, found.rows) == ((), rows)


def test_rows_that_are_not_finite_are_left_out(tmp_path: Path):
    vectors = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    vectors[2], vectors[4], vectors[5, 0] = np.nan, 0, np.inf
    vectors[3] = 2 * vectors[1]
    folder = write_folder(tmp_path / "some", [(drawn_rows(0, 6), vectors)], 8)
    [group] = find_duplicates(folder, pixels=False, keep="first").groups
    assert [member.id[-5] for member in group] == ["1", "3"]


def test_so_many_pairs_that_they_are_no_copies_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs_module, "MOST_PAIRS", 1000)
    with pytest.raises(UsageError, match="More than 1,000 pairs of photographs have a cosine"):
        find_pairs(unit(300, 8), 0.5, CPU, quiet)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    with Image.open(photographs()[1]) as opened:
        small = opened.convert("RGB").resize((280, 196))
    large = small.resize((308, 210))
    small.save(folder / "a.png")
    shutil.copy(folder / "a.png", folder / "b.png")
    small.save(folder / "c.bmp")
    large.save(folder / "d.jpg", quality=95)
    other = np.random.default_rng(5).integers(0, 255, (84, 112, 3), np.uint8)
    Image.fromarray(other).save(folder / "e.png")
    for name in ("x.jpg", "y.jpg"):
        (folder / name).write_bytes(b"not an image")
    (folder / "z.jpg").write_bytes(b"not an image either")
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    out = tmp_path_factory.mktemp("features") / "out"
    packvit.embed(photos, out=out, model="tiny", device="cpu")
    return out


def test_copies_are_told_apart_by_bytes_pixels_and_features(features: Path, photos: Path):
    found = find_duplicates(features, threshold=0.9, keep="first", device="cpu")
    [images, broken] = [[(m.id, m.match) for m in group] for group in found.groups]
    assert images == [
        ("a.png", "first"),
        ("b.png", "bytes"),
        ("c.bmp", "pixels"),
        ("d.jpg", "near"),
    ]
    assert broken == [("x.jpg", "first"), ("y.jpg", "bytes")]
    rows = packvit.read(features)
    a, d = (rows.matrix[rows.ids.index(name)].astype(np.float64) for name in ("a.png", "d.jpg"))
    expected = a @ d / np.linalg.norm(a) / np.linalg.norm(d)
    assert found.groups[0][3].score == pytest.approx(expected, abs=1e-6)
    assert expected < 0.999
    away = find_duplicates(features, threshold=0.9, keep="first", root="/nowhere", device="cpu")
    assert [m.match for m in away.groups[0]] == ["first", "bytes", "near", "near"]
    assert away.unread == 2
    copies = find_duplicates(features, threshold=1.0, pixels=False, device="cpu")
    assert [member.id for member in copies.groups[0]][:2] == ["a.png", "b.png"]
    assert "d.jpg" not in [member.id for group in copies.groups for member in group]


def test_the_largest_is_kept_and_the_paths_of_the_others_are_printed(
    tmp_path: Path, features: Path, photos: Path
):
    before = sorted(photos.iterdir())
    argv = (features, "--threshold", 0.9, "--device", "cpu")
    result = invoke(*argv, "--keep", "largest")
    assert result.exit_code == 0
    gone = ["a.png", "b.png", "c.bmp", "y.jpg"]
    assert result.stdout.splitlines() == [str(photos / name) for name in gone]
    assert result.stderr == "2 groups in 8 photographs; 4 may go\n"
    assert sorted(photos.iterdir()) == before
    listed = json.loads(invoke(*argv, "--json").stdout)
    assert [member["id"] for member in listed["groups"][0]] == ["d.jpg", "a.png", "b.png", "c.bmp"]
    table = invoke(*argv, "--out", tmp_path / "groups.png").stdout
    assert "group 1: 4 photographs\n" in table
    assert f"  equal bytes     no image  {photos / 'y.jpg'}\n" in table
    with Image.open(tmp_path / "groups.png") as sheet:
        inked = (np.asarray(sheet)[100:400] < 250).any(2)
        assert inked.mean() > 0.3


def test_a_mistake_is_answered_in_a_sentence(tmp_path: Path, features: Path, photos: Path):
    for argv, answer in (
        ((photos,), "is not a feature folder"),
        ((features, "--threshold", 1.5), "--threshold is 1.5, but must be above 0 and at most 1."),
        ((features, "--device", "tpu"), 'device "tpu" cannot be used'),
        ((features, "--out", photos / "a.png"), "which is one of the photographs"),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr, argv


def test_the_benchmark_counts_pairs_within_groups(tmp_path: Path, photos: Path):
    found = measure("tiny", [photos / "a.png", photos / "e.png"], tmp_path)
    results = found["results"]
    assert isinstance(results, dict)
    assert results["0.8"]["precision"] == 1
    recalls = [row["recall"] for row in results.values()]
    assert recalls == sorted(recalls, reverse=True)
    assert results["0.9"]["recall_of_ways"]["JPEG of quality 75"] >= 0.5
