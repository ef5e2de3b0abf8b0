import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rotten
from sklearn.neighbors import NearestNeighbors
from small_checkpoint import write_checkpoint

import packvit
from packvit import pictures
from packvit.corpus import UsageError
from packvit.corpus.folder.layout import Commit, append_line, read_commits, read_log
from packvit.corpus.folder.names import CURRENT
from packvit.encoder import Encoder
from packvit.pictures.colours import BLANK
from packvit.pictures.neighbours import nearest, thumbnail
from packvit.retrieval import folders
from packvit.retrieval.folders import open_vectors


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


def test_the_nearest_are_scikit_learns(features: Path):
    rows = pq.read_table(features / CURRENT.part(0)).to_pylist()
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) == len(rows) - 1
    vectors = np.array([row["pooled"] for row in good])
    distances, places = NearestNeighbors(n_neighbors=5, metric="cosine").fit(vectors).kneighbors()
    found = nearest(vectors, open_vectors(features), 6)
    for query, near in enumerate(found):
        assert near[0].id == good[query]["id"]  # a photograph finds itself first
        assert near[0].score == pytest.approx(1)
        assert [one.id for one in near[1:]] == [good[i]["id"] for i in places[query]]
        scores = [one.score for one in near[1:]]
        np.testing.assert_allclose(scores, 1 - distances[query], atol=1e-6)
    [every, *_] = nearest(vectors, open_vectors(features), 100)
    assert len(every) == len(good)  # and the row without features is none


def test_the_sheet_shows_the_photograph_beside_itself(
    encoder: Encoder, features: Path, photos: Path
):
    path = photos / "good-0003.jpg"
    sheet = pictures.draw_neighbours(encoder, [path], features, root=photos, neighbours=1)
    blank = pictures.draw_neighbours(encoder, [path], features, neighbours=1)
    below = np.asarray(sheet, int)[100:400]  # under the title
    inked = (below < 250).any((0, 2))
    starts, ends = (np.flatnonzero(np.diff(inked.astype(int)) == sign) + 1 for sign in (1, -1))
    left, right = (below[:, i:j] for i, j in zip(starts, ends, strict=True))
    width = min(left.shape[1], right.shape[1])
    assert width > 200
    apart, mirrored = (
        np.abs(left[:, :width] - other[:, :width]).mean() for other in (right, right[:, ::-1])
    )
    assert apart < mirrored / 2
    plain = np.asarray(blank, int)[100:400, starts[1] + 20 : ends[1] - 20]
    assert (plain == BLANK).all()


def test_photographs_are_looked_for_under_the_root_and_blank_where_they_are_not(photos: Path):
    lost: list[str] = []
    assert thumbnail(photos, "good-0000.jpg", lost).getextrema() != ((238, 238),) * 3
    for name in ("bad.jpg", "gone.jpg", "gone.jpg"):
        assert thumbnail(photos, name, lost).getextrema() == ((238, 238),) * 3
    assert lost == ["bad.jpg", "gone.jpg"]


def test_what_the_log_does_not_vouch_for_is_not_read(
    tmp_path: Path, features: Path, encoder: Encoder
):
    copy = tmp_path / "copy"
    shutil.copytree(features, copy)
    table = pq.read_table(features / CURRENT.part(0))
    ids = pa.array([f"stray-{i}" for i in range(len(table))])
    pq.write_table(table.set_column(0, "id", ids), copy / CURRENT.part(1))
    query = np.array([row for row in table["pooled"].to_pylist() if row][:1])
    found = nearest(query, open_vectors(copy), 3)
    assert found == nearest(query, open_vectors(features), 3)
    assert len(read_commits(copy)) == 1
    (copy / "_commits.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"_commits.jsonl is missing or damaged"):
        open_vectors(copy)
    append_line(copy / "_commits.jsonl", read_log(features)[0].decode().strip())
    part = bytearray((copy / CURRENT.part(0)).read_bytes())
    part[len(part) // 3] ^= 255
    (copy / CURRENT.part(0)).write_bytes(part)
    with pytest.raises(
        UsageError, match=r"data/part-00000.parquet is missing or damaged. `packvit check"
    ):
        nearest(query, open_vectors(copy), 3)


def test_rows_of_a_folder_that_took_the_place_of_the_one_searched_are_refused(
    tmp_path: Path, features: Path
):
    out, new = (shutil.copytree(features, tmp_path / name) for name in ("out", "new"))
    vectors = open_vectors(out)
    query = np.ones((1, vectors.width), np.float32)
    assert len(nearest(query, vectors, 3)[0]) == 3
    out.rename(tmp_path / "old")
    new.rename(out)
    with pytest.raises(UsageError, match="out changed while it was read"):
        nearest(query, vectors, 3)


def test_a_folder_that_is_replaced_while_it_is_opened_is_not_called_damaged(
    tmp_path: Path, features: Path, photos: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    out, new = shutil.copytree(features, tmp_path / "out"), tmp_path / "new"
    packvit.embed(photos / "bad.jpg", out=new, model=encoder)

    def late(folder: Path) -> tuple[Commit, ...]:
        out.rename(tmp_path / "old")
        new.rename(out)
        return read_commits(folder)

    monkeypatch.setattr(folders, "read_commits", late)
    with pytest.raises(UsageError, match="out changed while it was read"):
        open_vectors(out)


def test_a_folder_of_errors_alone_has_no_neighbours(tmp_path: Path, encoder: Encoder, photos: Path):
    packvit.embed(photos / "bad.jpg", out=tmp_path / "out", model=encoder)
    with pytest.raises(UsageError, match="holds no row with features: all are errors"):
        pictures.draw_neighbours(encoder, [photos / "good-0000.jpg"], tmp_path / "out")


def test_another_models_folder_is_refused(tmp_path: Path, features: Path, photos: Path):
    other = packvit.load(write_checkpoint(tmp_path, scale=2.0), device="cpu")
    path = photos / "good-0000.jpg"
    with pytest.raises(UsageError, match=r"has other weights, so they cannot be compared"):
        pictures.draw_neighbours(other, [path], features)
    with pytest.raises(UsageError, match="is not a feature folder"):
        pictures.draw_neighbours(other, [path], tmp_path)
