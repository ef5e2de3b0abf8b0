import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from features import contents
from full_disk import small_disk
from rotten import encode, pixels, write_good
from small_checkpoint import WIDTH, write_checkpoint

import packvit
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_manifest
from packvit.corpus.folder.parts import DtypeOut, Outputs
from packvit.corpus.folder.sizes import describe_size, in_units, row_bytes
from packvit.corpus.job import embed
from packvit.corpus.progress import Progress
from packvit.encoder import Encoder
from packvit.retrieval.folders import open_vectors


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 10)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_pooled_is_written_as_float16_where_that_is_asked_for_and_rounded_to_nearest(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    same = {"model": encoder, "workers": 1, "format": "npy"}
    embed(photos, out=tmp_path / "full", **same)
    embed(photos, out=tmp_path / "half", dtype_out="float16", **same)
    part = pq.read_table(tmp_path / "half/data/part-00000.parquet")
    assert part.schema.field("pooled").type == pa.list_(pa.field("element", pa.float16()), WIDTH)
    full, half = packvit.read(tmp_path / "full"), packvit.read(tmp_path / "half")
    assert (full.matrix.dtype, half.matrix.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(half.matrix, full.matrix.astype(np.float16))
    np.testing.assert_array_equal(half.matrix, np.load(tmp_path / "half/_exports/pooled.npy"))
    assert np.isnan(half.matrix[half.ids.index("broken.jpg")]).all()
    (tmp_path / "half/_exports/pooled.npy").unlink()
    np.testing.assert_array_equal(packvit.read(tmp_path / "half").matrix, half.matrix)
    for _, block in open_vectors(tmp_path / "half").blocks():
        assert block.dtype == np.float32
        np.testing.assert_array_equal(block, half.matrix.astype(np.float32))
    embed(photos, out=tmp_path / "half", dtype_out="float16", **same)
    assert not check_folder(tmp_path / "half").faults
    for name in ("full", "half"):
        manifest = read_manifest(tmp_path / name)
        assert manifest
        assert Outputs.of_manifest(manifest).vector_dtype == manifest.get("vector_dtype", "float32")


def test_a_vector_that_float16_cannot_hold_is_an_overflow_and_infinity_is_not_finite(
    tmp_path: Path, photos: Path
):
    loud = packvit.load(write_checkpoint(tmp_path / "loud", head=False, scale=1e6), device="cpu")
    summary = embed(photos, out=tmp_path / "half", model=loud, workers=1, dtype_out="float16")
    assert summary.errors == {"overflow": 10, "unidentified": 1}
    summary = embed(photos, out=tmp_path / "full", model=loud, workers=1)
    assert summary.errors == {"unidentified": 1}


def test_rows_of_float16_are_reused_and_merged_like_others(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    encoder = packvit.load(checkpoint, device="cpu", invariant=True)
    same = {"model": encoder, "workers": 1, "dtype_out": "float16", "rows_per_part": 4}
    embed(photos, out=tmp_path / "one", **same)
    embed(photos, out=tmp_path / "two", reuse=[tmp_path / "one"], **same)
    for number in (1, 2):
        embed(photos, out=tmp_path / f"s{number}", shard=f"{number}/2", **same)
    packvit.merge([tmp_path / "s1", tmp_path / "s2"], out=tmp_path / "merged")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "merged")


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype_out", [None, "float16", "float32"])
def test_the_estimate_is_near_what_is_written(
    tmp_path: Path, encoder: Encoder, tokens: bool, dtype_out: DtypeOut | None
):
    (tmp_path / "photos").mkdir()
    for number in range(64):  # of the shape that the estimate takes for typical
        data = encode(pixels(56, 84, number), "PNG")
        (tmp_path / f"photos/{number:040}.png").write_bytes(data)
    out = tmp_path / "out"
    embed(tmp_path / "photos", out=out, model=encoder, tokens=tokens, dtype_out=dtype_out)
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    said = 64 * row_bytes(Outputs.of_manifest(manifest), (56 // 14) * (84 // 14))
    written = os.path.getsize(tmp_path / "out/data/part-00000.parquet")
    assert written / 1.3 < said < written * 1.6


def test_the_size_is_said_where_it_is_large_or_does_not_fit(tmp_path: Path):
    assert describe_size(tmp_path, 1000, 1000) == ()
    [said] = describe_size(tmp_path / "not/there", 10**9, 4200)
    assert said.startswith("1,000,000,000 rows of about 4.2 kB take 4.2 TB; the disk has ")
    assert in_units(999) == "999 B"
    assert in_units(47e9) == "47 GB"


def test_a_job_says_before_it_begins_that_its_disk_is_too_small(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    notes: list[str] = []

    def tell(progress: Progress) -> None:
        notes.extend(progress.notes)
        raise KeyboardInterrupt

    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "40k") as disk, pytest.raises(KeyboardInterrupt):
        embed(photos, out=disk / "out", model=encoder, tokens=True, workers=1, progress=tell)
    [said] = notes
    assert said.startswith("11 rows of about ")
    assert said.endswith(" They will not fit.")
