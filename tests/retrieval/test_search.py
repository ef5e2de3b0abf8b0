import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rotten
import torch
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from small_checkpoint import write_checkpoint

import packvit
from benchmarks.drawn import drawn_rows, write_folder
from packvit.cli import main
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import read_manifest, write_manifest
from packvit.images.decode import load_image
from packvit.pictures.contact import draw_hits
from packvit.retrieval.folders import open_vectors
from packvit.retrieval.nearest import find_nearest
from packvit.retrieval.photographs import find_inputs, load_photograph
from packvit.retrieval.queries import BrokenQuery, read_queries
from packvit.retrieval.search import find, scan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rotten.write_good(folder, 12)
    (folder / "bad.jpg").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, photos: Path, checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("features") / "out"
    packvit.embed(photos, out=out, model=checkpoint, device="cpu", max_patches=12)
    return out


def good(photos: Path, number: int) -> Path:
    [path] = photos.glob(f"good-{number:04d}.*")
    return path


def invoke(*argv: object) -> Result:
    return CliRunner().invoke(main, ["search", *(str(word) for word in argv)])


def drawn(tmp_path: Path, rows: int = 700, width: int = 24) -> tuple[Path, np.ndarray]:
    vectors = np.random.default_rng(3).standard_normal((rows, width)).astype(np.float32)
    starts = range(0, rows, 64)
    blocks = [(drawn_rows(i, min(i + 64, rows)), vectors[i : i + 64]) for i in starts]
    return write_folder(tmp_path / "drawn", blocks, width), vectors


def test_a_photographs_neighbours_are_scikit_learns_without_itself(features: Path, photos: Path):
    rows = packvit.read(features).good()
    distances, places = (
        NearestNeighbors(n_neighbors=5, metric="cosine").fit(rows.matrix).kneighbors()
    )
    queries = [str(photos / name) for name in rows.ids]
    for query, hits in enumerate(packvit.search(features, queries, top=5, device="cpu")):
        assert [hit.id for hit in hits] == [rows.ids[place] for place in places[query]]
        np.testing.assert_allclose([h.score for h in hits], 1 - distances[query], atol=2e-6)
        assert [hit.path for hit in hits] == [str(photos / hit.id) for hit in hits]


def test_a_photograph_that_moved_since_is_known_by_its_bytes(
    tmp_path: Path, features: Path, photos: Path
):
    away = shutil.copytree(features, tmp_path / "features")
    manifest = read_manifest(features)
    assert manifest
    write_manifest(away, manifest | {"root": {"path": "/nowhere", "image_column": "image"}})
    query = good(photos, 3)
    [hits] = packvit.search(away, [query], top=12, device="cpu")
    assert len(hits) == 11
    assert query.name not in [hit.id for hit in hits]
    copy = shutil.copy(query, tmp_path / "copy.jpg")  # another file beside the one in the folder
    [hits] = packvit.search(features, [copy], top=12, device="cpu")
    assert (hits[0].id, len(hits)) == (query.name, 12)


def test_a_sum_is_the_cosine_to_the_weighted_sum_of_unit_vectors(features: Path, photos: Path):
    rows = packvit.read(features).good()
    unit = rows.matrix.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    a, b, c = (str(good(photos, i)) for i in (1, 4, 6))
    wanted = 2 * unit[1] + unit[4] - 0.5 * unit[6]
    expected = unit @ wanted / np.linalg.norm(wanted)
    order = [i for i in np.argsort(-expected) if i not in (1, 4, 6)]
    for asked in ([f"2:{a}", f"+ {b}", f"- 0.5:{c}"], [f"2:{a}", "+", b, "-", f"0.5:{c}"]):
        [hits] = packvit.search(features, asked, top=4, device="cpu")
        assert [hit.id for hit in hits] == [rows.ids[place] for place in order[:4]]
        np.testing.assert_allclose([h.score for h in hits], expected[order[:4]], atol=2e-6)


def test_several_folders_are_searched_as_one(tmp_path: Path, photos: Path, checkpoint: Path):
    names = [good(photos, i).name for i in range(12)]
    for half, chosen in (("a", names[:5]), ("b", names[5:])):
        (tmp_path / half).mkdir()
        for name in chosen:
            shutil.copy(photos / name, tmp_path / half)
        packvit.embed(tmp_path / half, out=tmp_path / f"{half}.out", model=checkpoint, device="cpu")
    packvit.embed(photos, out=tmp_path / "all", model=checkpoint, device="cpu")
    both = [tmp_path / "a.out", tmp_path / "b.out"]
    [one] = packvit.search(tmp_path / "all", [photos / names[0]], top=6, device="cpu")
    [two] = packvit.search(both, [tmp_path / "a" / names[0]], top=6, device="cpu")
    assert [hit.id for hit in one] == [hit.id for hit in two]
    assert {hit.folder for hit in two} == set(both)


def test_a_file_in_two_folders_is_found_once(tmp_path: Path, features: Path, photos: Path):
    again = shutil.copytree(features, tmp_path / "again")
    alone = packvit.search(features, [good(photos, 0)], top=50)[0]
    both = packvit.search([features, again], [good(photos, 0)], top=10**12)[0]
    assert [hit.path for hit in both] == [hit.path for hit in alone]
    assert len(alone) == 11
    manifest = read_manifest(again)
    assert manifest
    write_manifest(again, manifest | {"root": None})  # of files that may be others
    assert len(packvit.search([features, again], [good(photos, 0)], top=50)[0]) == 22


def test_what_is_taken_away_alone_ranks_the_farthest_first(features: Path, photos: Path):
    query = str(good(photos, 0))
    near = packvit.search(features, [query], top=50)[0]
    far = packvit.search(features, ["-", query], top=50)[0]
    assert [hit.id for hit in far] == [hit.id for hit in reversed(near)]
    np.testing.assert_allclose(
        [hit.score for hit in far], [-hit.score for hit in reversed(near)], atol=1e-6
    )


def test_equal_scores_are_in_the_order_of_rows_whatever_a_block_holds(tmp_path: Path):
    vectors = np.sign(np.random.default_rng(0).standard_normal((700, 16))).astype(np.float32)
    rows = drawn_rows(0, 700)
    vectors[7] = np.nan
    rows[7] = replace(rows[7], status="truncated", stage="decode")
    vectors[8] = 0  # no direction, and so no cosine
    blocks = [(rows[i : i + 64], vectors[i : i + 64]) for i in range(0, 700, 64)]
    opened = open_vectors(write_folder(tmp_path / "ties", blocks, 16))
    queries = vectors[64:70]
    scores = np.delete(queries @ vectors.T, [7, 8], axis=1)  # whole numbers, so these are exact
    order = np.delete(np.arange(700), [7, 8])[np.argsort(-scores, kind="stable")]
    for size in (3, 64, 4096):
        for top in (5, 698, 700):
            cosines, found = find_nearest(queries, opened.blocks(size), top, CPU)
            assert np.array_equal(found[:, :698], order[:, :top])
            assert np.isfinite(cosines).sum(axis=1).tolist() == [min(top, 698)] * 6


def test_the_exported_matrix_gives_what_the_parts_give(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    for name in ("parquet", "npy"):
        packvit.embed(photos, out=tmp_path / name, model=checkpoint, device="cpu", format=name)
    query = good(photos, 2)
    [plain], [mapped] = (
        packvit.search(tmp_path / name, [query], device="cpu") for name in ("parquet", "npy")
    )
    assert open_vectors(tmp_path / "npy").exported
    assert [(hit.id, hit.score) for hit in plain] == [(hit.id, hit.score) for hit in mapped]


def test_photographs_are_found_again_wherever_they_came_from(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "one")
    (tmp_path / "odd").mkdir()
    shutil.copy(good(photos, 0), os.fsdecode(b"odd/caf\xe9 \\xe9.jpg"))
    data = (good(photos, 1)).read_bytes()
    with tarfile.open("some.tar", "w") as tar:
        for name in ("in/x.jpg", "in/y.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"picture": [data, data], "path": ["p.jpg", "q.jpg"]}), "some.parquet")
    listed = f"one/{good(photos, 2).name}"
    Path("list.txt").write_text(listed)
    expected = {"one": 12, "odd": 1, "some.tar": 2}
    for job, photographs in {
        "1": ["one"],
        "2": ["odd"],
        "3": ["some.tar"],
        "4": ["some.parquet"],
        "5": ["one", "odd", "some.tar", "some.parquet"],
    }.items():
        packvit.embed(photographs, out=job, model=checkpoint, device="cpu", image_column="picture")
        expected["some.parquet"] = 2
        monkeypatch.chdir("/")
        found = find(tmp_path / job, [np.asarray(load_image(good(photos, 4)).image)], 99)
        [hits] = found.hits
        assert len(hits) == sum(expected[name] for name in photographs)
        for path, one in find_inputs([hit.path for hit in hits], found.image_column).items():
            assert load_photograph(one).width > 0, path
        monkeypatch.chdir(tmp_path)
    packvit.embed(lists=["list.txt"], out="6", model=checkpoint, device="cpu")
    [hits] = packvit.search("6", [good(photos, 4)], device="cpu")
    assert [Path(hit.path) for hit in hits] == [tmp_path / listed]


def test_the_command_prints_what_the_library_finds(tmp_path: Path, features: Path, photos: Path):
    query = good(photos, 3)
    [hits] = packvit.search(features, [query], top=3, device="cpu")
    argv = (features, query, "-t", 3, "--device", "cpu")
    result = invoke(*argv)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"{hit.score:.4f}  {hit.path}" for hit in hits]
    assert invoke(*argv, "-f").stdout.splitlines() == [hit.path for hit in hits]
    found = json.loads(invoke(*argv, "--json").stdout)
    assert found["rows"] == 13
    [listed] = found["queries"]
    assert [(hit["id"], hit["score"]) for hit in listed["hits"]] == [(h.id, h.score) for h in hits]
    both = invoke(features, query, "- " + str(good(photos, 1)), "--json", "--device", "cpu")
    [listed] = json.loads(both.stdout)["queries"]
    assert listed["query"] == f"{query} - {good(photos, 1)}"
    assert invoke(*argv, "--out", tmp_path / "out.png").exit_code == 0
    expected, lost = draw_hits(find(features, [str(query)], 3, device="cpu"))
    assert not lost
    with Image.open(tmp_path / "out.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    blank = invoke(*argv, "--out", tmp_path / "out.png", "--root", tmp_path)
    assert "3 of the photographs" in blank.stderr
    assert "are left blank. Name their folder with --root." in blank.stderr


def test_a_mistake_is_answered_in_a_sentence(
    tmp_path: Path, features: Path, photos: Path, checkpoint: Path
):
    first = good(photos, 0)
    other = write_checkpoint(tmp_path / "other", scale=3.0)
    packvit.embed(photos, out=tmp_path / "else", model=other, device="cpu")
    half = shutil.copytree(features, tmp_path / "half")
    manifest = read_manifest(half)
    assert manifest
    write_manifest(half, manifest | {"complete": False})
    before = first.read_bytes()
    for argv, answer in (
        ((features,), "Missing argument '[FOLDER...] QUERY...'"),
        ((photos, "x"), "is not a feature folder"),
        ((half, first), "is half done: 13 of 13 rows are written. Run the same embed command"),
        ((features, "red bicycle"), "knows no words. Search by photographs"),
        ((features, tmp_path / "gone.jpg"), "but there is no such file. Check the path"),
        ((features, first, "+"), 'Nothing stands behind the "+" of the query'),
        ((features, first, "- " + str(first)), "its terms cancel out"),
        ((features, " "), "A query is empty"),
        ((features, photos), "is a folder. Give words, or the path of a photograph"),
        ((features, "/dev/null"), "/dev/null is no file. Give words, or the path"),
        ((features, f"0:{first}"), "A query has no direction: its terms cancel out"),
        ((features, first, "-f", "--json"), "-f and --json exclude each other"),
        ((features, first, "--model", other), "so they cannot be compared. Leave --model out"),
        ((features, tmp_path / "else", first), "whose vectors cannot be compared"),
        ((features, first, "--out", first), "which is one of the photographs"),
        ((features, first, "--out", "x.txt"), "must end in .png"),
        ((features, first, "--device", "tpu"), 'device "tpu" cannot be used'),
    ):
        result = invoke(*argv)
        assert (result.exit_code, result.stdout) == (2, ""), argv
        assert answer in result.stderr.splitlines()[0], argv
    assert first.read_bytes() == before
    result = invoke(features, photos / "bad.jpg")
    assert result.exit_code == 1
    assert "bad.jpg cannot be a query: unidentified: these bytes are no image" in result.stderr
    with pytest.raises(BrokenQuery, match="image cannot be a query"):
        packvit.search(features, b"nothing")
    with pytest.raises(UsageError, match="top is 0, but must be 1 or more"):
        packvit.search(features, [first], top=0)


def test_a_query_is_read_as_it_is_typed(photos: Path):
    photo = str(good(photos, 0))
    image = Image.new("RGB", (4, 4))
    read = read_queries(["2:red bicycle", "+ " + photo, "- night", "0.5:" + photo, image, "a - b"])
    assert [query.typed for query in read] == [
        f"2:red bicycle + {photo} - night",
        f"0.5:{photo}",
        "image",
        "a - b",
    ]
    assert [(t.weight, t.words, t.photo) for t in read[0].terms] == [
        (2.0, "red bicycle", None),
        (1.0, None, photo),
        (-1.0, "night", None),
    ]
    assert read[1].terms[0].weight == 0.5
    assert read[3].terms[0].words == "a - b"


def test_an_index_is_built_once_and_again_for_other_parts(tmp_path: Path):
    pytest.importorskip("usearch")
    from packvit.corpus.folder.checking import check_folder
    from packvit.retrieval.index import search_index

    folder, vectors = drawn(tmp_path)
    opened = open_vectors(folder)
    exact, wanted = scan(opened, vectors[:5], 10, "cpu")
    scores, rows, note = search_index(opened, vectors[:5], 10)
    assert "index built" in note
    # Threads add the rows in whatever order they run, so now and then one neighbour is missed.
    recall = re.search(r"700 rows, recall at 10 (\d\.\d+) ", note)
    assert recall is not None
    assert float(recall[1]) > 0.95
    shared = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), wanted.tolist(), strict=True)]
    assert sum(shared) > 0.9 * wanted.size
    both = rows == wanted
    np.testing.assert_allclose(scores[both], exact[both], atol=1e-6)
    assert "index used" in search_index(opened, vectors[:5], 10)[2]
    assert not [fault for fault in check_folder(folder).faults if "usearch" in fault.file]
    shutil.rmtree(folder / "data")
    (folder / "_commits.jsonl").unlink()
    shutil.move(folder / "_exports", tmp_path / "kept")
    shutil.rmtree(folder)
    write_folder(folder, [(drawn_rows(0, 64), vectors[64:128])], 24)
    shutil.move(tmp_path / "kept", folder / "_exports")
    scores, rows, note = search_index(open_vectors(folder), vectors[64:65], 100)
    assert "index built" in note
    assert rows[0, 0] == 0
    assert np.isfinite(scores).sum() == 64
