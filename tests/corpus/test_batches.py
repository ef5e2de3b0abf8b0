"""`packvit.Embedder` in the libraries that call it, beside the encoder itself."""

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

import packvit
from packvit.encoder import Encoder


def photo(seed: int) -> np.ndarray:
    size = (20 + seed, 30, 3)
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


PHOTOS = [photo(seed) for seed in range(4)]
FILES = [encode(pixels) for pixels in PHOTOS]
BROKEN = FILES[0][:-300]


@pytest.fixture
def embedder(checkpoint: Path) -> packvit.Embedder:
    return packvit.Embedder(checkpoint, device="cpu", invariant=True)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return packvit.load(checkpoint, device="cpu", invariant=True).embed(PHOTOS)


def test_every_kind_of_cell_gives_the_vector_that_the_encoder_gives(
    tmp_path: Path, embedder: packvit.Embedder, expected: np.ndarray
):
    path = tmp_path / "x.png"
    path.write_bytes(FILES[0])
    kinds = {
        "bytes": FILES[0],
        "buffer": memoryview(FILES[0]),
        "path": str(path),
        "url": f"file://{path}",
        "datasets": {"bytes": FILES[0], "path": "gone.png"},
        "path alone": {"bytes": None, "path": str(path)},
        "image": Image.fromarray(PHOTOS[0]),
        "array": PHOTOS[0],
    }
    found = embedder({"image": list(kinds.values()), "kind": list(kinds)})
    assert found["kind"] == list(kinds)
    assert found["status"].tolist() == ["ok"] * len(kinds)
    assert found["pooled"].dtype == np.float32
    np.testing.assert_array_equal(found["pooled"], np.repeat(expected[:1], len(kinds), 0))


def test_a_bad_image_is_a_row_of_nan_and_its_code_and_changes_no_other(
    embedder: packvit.Embedder, expected: np.ndarray
):
    cells = [None, FILES[0], BROKEN, FILES[1], "gone.png", {"bytes": b"x"}, "s3x://no", FILES[2]]
    found = embedder({"image": cells})
    assert found["status"].tolist() == [
        *("missing", "ok", "truncated", "ok", "missing", "unidentified", "unreadable", "ok")
    ]
    good = found["status"] == "ok"
    np.testing.assert_array_equal(found["pooled"][good], expected[:3])
    assert np.isnan(found["pooled"][~good]).all()
    assert embedder({"image": []})["pooled"].shape == (0, expected.shape[1])


def test_it_loads_once_and_a_pickled_copy_has_no_encoder(
    embedder: packvit.Embedder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    before = pickle.dumps(embedder)
    assert embedder.encoder is None
    embedder({"image": FILES})
    loaded = embedder.encoder
    embedder({"image": FILES})
    assert isinstance(loaded, Encoder)
    assert embedder.encoder is loaded
    assert pickle.dumps(embedder) == before
    copy: packvit.Embedder = pickle.loads(before)
    np.testing.assert_array_equal(copy({"image": FILES})["pooled"], expected)


def test_datasets_map_gives_the_vectors_of_files_and_of_decoded_images(
    tmp_path: Path, embedder: packvit.Embedder, expected: np.ndarray
):
    rows: Any = datasets.Dataset.from_dict({"image": [*FILES, BROKEN], "n": range(5)})
    files = rows.cast_column("image", datasets.Image(decode=False))
    found = files.map(embedder, batched=True, batch_size=2, remove_columns="image")
    assert found.column_names == ["n", "pooled", "status"]
    assert found["status"][:] == ["ok"] * 4 + ["truncated"]
    np.testing.assert_array_equal(np.array(found["pooled"][:4], np.float32), expected)
    images = rows.select(range(4)).cast_column("image", datasets.Image())
    found = images.map(embedder, batched=True, remove_columns="image")
    np.testing.assert_array_equal(np.array(found["pooled"][:], np.float32), expected)


@pytest.mark.parametrize(
    ("batch", "kind", "said"),
    [
        ({"photo": []}, ValueError, 'no column "image". It has: photo.'),
        ({"image": [], "status": []}, ValueError, 'a column "status" already'),
        ({"image": "x.png"}, TypeError, "batched=True"),
        ([1], TypeError, "but this is a list"),
        ({"image": [np.zeros((4, 4, 3))]}, TypeError, "An image array must be uint8"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused_in_words(
    embedder: packvit.Embedder, batch: Any, kind: type[Exception], said: str
):
    with pytest.raises(kind, match=said):
        embedder(batch)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # Ray's own, of its defaults
def test_ray_data_gives_the_vectors_in_actors(
    embedder: packvit.Embedder, checkpoint: Path, expected: np.ndarray
):
    ray = pytest.importorskip("ray")
    data = pytest.importorskip("ray.data")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        rows = data.from_items([{"image": f, "n": n} for n, f in enumerate([*FILES, BROKEN])])
        options = {"device": "cpu", "invariant": True}
        found = rows.map_batches(
            packvit.Embedder,
            fn_constructor_args=(str(checkpoint),),
            fn_constructor_kwargs=options,
            batch_size=2,
            concurrency=1,
        ).take_all()
    finally:
        ray.shutdown()
    found.sort(key=lambda row: row["n"])
    assert [row["status"] for row in found] == ["ok"] * 4 + ["truncated"]
    np.testing.assert_array_equal(np.stack([row["pooled"] for row in found[:4]]), expected)
