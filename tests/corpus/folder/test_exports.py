"""A feature folder opens in the readers that people have, and a matrix can be made of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from features import contents
from rotten import write_good
from small_checkpoint import WIDTH

from packvit.cli import main
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.exports import check_format
from packvit.corpus.folder.layout import read_manifest
from packvit.corpus.job import embed
from packvit.encoder import Encoder

NAMES = ("_exports/pooled.npy", "_exports/ids.jsonl")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    names = write_good(folder, 7)
    for number in range(140):
        os.link(folder / names[number % 7], folder / f"{number:03}.jpg")
    (folder / "070\n.jpg").write_bytes(b"no image, and a name of two lines")
    (folder / "é.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def out(tmp_path: Path, photos: Path, encoder: Encoder) -> Path:
    embed(photos, out=tmp_path / "out", model=encoder, tokens=True, format="npy")
    return tmp_path / "out"


def read_parts(out: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Return ids, statuses and pooled features, NaN where there are none, as pyarrow reads them."""
    table = pq.ParquetDataset(sorted(out.glob("data/*.parquet"))).read()
    rows = table["pooled"].to_pylist()
    pooled = np.array([row or [np.nan] * WIDTH for row in rows], np.float32)
    return table["id"].to_pylist(), table["status"].to_pylist(), pooled


def test_the_matrix_has_the_bits_of_the_parts_and_nan_where_a_row_is_an_error(out: Path):
    ids, statuses, pooled = read_parts(out)
    matrix = np.load(out / "_exports/pooled.npy", mmap_mode="r")
    assert isinstance(matrix, np.memmap)
    assert (matrix.shape, matrix.dtype) == ((len(ids), WIDTH), np.float32)
    assert np.array_equal(matrix, pooled, equal_nan=True)
    lines = [json.loads(line) for line in (out / "_exports/ids.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert [line["status"] for line in lines] == statuses
    bad = np.isnan(matrix).all(1)
    assert [status != "ok" for status in statuses] == bad.tolist()
    assert bad.sum() == 2
    assert np.isfinite(matrix[~bad]).all()


def read_pandas(out: Path, cache: Path) -> list[dict[str, Any]]:
    return pandas.read_parquet(out).to_dict("records")


def read_pyarrow(out: Path, cache: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(out).to_pylist()
    assert pyarrow.dataset.dataset(out).to_table().to_pylist() == rows
    return rows


def read_polars(out: Path, cache: Path) -> list[dict[str, Any]]:
    return polars.read_parquet(out / "data").to_dicts()


def read_duckdb(out: Path, cache: Path) -> list[dict[str, Any]]:
    with duckdb.connect() as connection:
        query = f"from '{out}/data/*.parquet'"
        rows = connection.execute(query)
        names = [column[0] for column in rows.description or ()]
        return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]


def read_datasets(out: Path, cache: Path) -> list[dict[str, Any]]:
    folder = str(out / "data")
    loaded = datasets.load_dataset("parquet", data_dir=folder, cache_dir=str(cache))
    return [dict(row) for row in loaded["train"]]


def read_ray(out: Path, cache: Path) -> list[dict[str, Any]]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.read_parquet(str(out / "data")).take_all()
        return sorted(rows, key=lambda row: row["id"].encode())
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    "reader",
    [
        read_pandas,
        read_pyarrow,
        read_polars,
        read_duckdb,
        read_datasets,
        pytest.param(
            read_ray,
            marks=[
                pytest.mark.soak,
                # Its own defaults are deprecated.
                pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
            ],
        ),
    ],
)
def test_the_folder_opens_in_the_readers_that_people_have(  # W12
    out: Path, tmp_path: Path, reader: Callable[[Path, Path], list[dict[str, Any]]]
):
    ids, statuses, pooled = read_parts(out)
    (out / "_certificate.json").write_text("{}")  # as --verify writes
    rows = reader(out, tmp_path / "cache")
    assert [row["id"] for row in rows] == ids
    assert [row["status"] for row in rows] == statuses
    missing = [np.full(WIDTH, np.nan, np.float32)] * len(rows)
    found = [
        gap if row["pooled"] is None else np.float32(row["pooled"])
        for row, gap in zip(rows, missing, strict=True)
    ]
    assert np.array_equal(np.stack(found), pooled, equal_nan=True)
    assert {"tokens", "sha256", "width"} <= set(rows[0])


@pytest.mark.soak
def test_spark_reads_the_parts_where_no_column_is_float16(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    sql = pytest.importorskip("pyspark.sql", reason="needs Java and pip install pyspark")
    out = tmp_path / "out"
    embed(photos, out=out, model=encoder, tokens=True, dtype_out="float32")
    ids, _, pooled = read_parts(out)
    session = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = session.getOrCreate()
    try:
        rows = {row["id"]: row["pooled"] for row in spark.read.parquet(str(out / "data")).collect()}
    finally:
        spark.stop()
    assert set(rows) == set(ids)
    found = np.array([rows[name] or [np.nan] * WIDTH for name in ids], np.float32)
    assert np.array_equal(found, pooled, equal_nan=True)


def test_ids_open_in_polars_and_duckdb(out: Path):
    ids, _, _ = read_parts(out)
    names = str(out / "_exports/ids.jsonl")
    assert polars.read_ndjson(names)["id"].to_list() == ids
    with duckdb.connect() as connection:
        counted = connection.execute(
            "select count(*) from read_json(?) where status <> 'ok'", [names]
        ).fetchone()
    assert counted == (2,)


def test_a_finished_job_gets_its_matrix_without_reading_an_image(
    tmp_path: Path, out: Path, photos: Path, encoder: Encoder
):
    own = shutil.copytree(photos, tmp_path / "photos")
    embed(own, out=tmp_path / "plain", model=encoder, tokens=True)
    assert not (tmp_path / "plain" / "_exports/pooled.npy").exists()
    for path in own.iterdir():
        path.write_bytes(b"")  # whoever reads finds no image
    embed(own, out=tmp_path / "plain", model=encoder, tokens=True, format="npy")
    mine, theirs = ((read_manifest(each) or {}) for each in (tmp_path / "plain", out))
    assert mine | {"root": None} == theirs | {"root": None}  # which says where photographs are
    mine, theirs = (contents(each) for each in (tmp_path / "plain", out))
    assert mine | {"_manifest.json": b""} == theirs | {"_manifest.json": b""}


def test_a_damaged_or_missing_matrix_is_found_and_made_again_alone(
    out: Path, photos: Path, encoder: Encoder
):
    whole = {name: (out / name).read_bytes() for name in NAMES}
    damaged = bytearray(whole["_exports/pooled.npy"])
    damaged[1000] ^= 1
    (out / "_exports/pooled.npy").write_bytes(damaged)
    (out / "_exports/ids.jsonl").unlink()
    found = CliRunner().invoke(main, ["check", str(out)])
    assert found.exit_code == 1
    assert "pooled.npy is damaged" in found.output.replace("  ", " ")
    assert "--format npy" in found.output
    embed(photos, out=out, model=encoder, tokens=True, format="npy")
    assert {name: (out / name).read_bytes() for name in NAMES} == whole
    assert CliRunner().invoke(main, ["check", str(out)]).exit_code == 0
    states = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for format in ("npy", "parquet"):
        embed(photos, out=out, model=encoder, tokens=True, format=format)
    assert states == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "_manifest.json").write_bytes(
        (out / "_manifest.json").read_bytes().replace(b'"exports": {', b'"exported": {')
    )
    assert CliRunner().invoke(main, ["check", str(out)]).exit_code == 1


def test_overwrite_removes_the_matrix_too(out: Path, photos: Path, encoder: Encoder):
    embed(photos, out=out, model=encoder, tokens=True, overwrite=True)
    assert not set(NAMES) & set(contents(out))
    manifest = read_manifest(out)
    assert manifest
    assert manifest["exports"] == {}


def test_a_matrix_that_cannot_be_written_leaves_the_parts_whole(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    (tmp_path / "_exports/pooled.npy").mkdir(parents=True)
    with pytest.raises(UsageError):  # a folder of that name is none of ours
        embed(photos, out=tmp_path, model=encoder, format="npy")
    (tmp_path / "_exports/pooled.npy").rmdir()
    embed(photos, out=tmp_path, model=encoder)
    (tmp_path / "_exports/pooled.npy").mkdir(parents=True)
    with pytest.raises(WriteError, match=r"pooled.npy could not be written"):
        embed(photos, out=tmp_path, model=encoder, format="npy")
    (tmp_path / "_exports/pooled.npy").rmdir()
    assert embed(photos, out=tmp_path, model=encoder, format="npy").ok == 147
    assert CliRunner().invoke(main, ["check", str(tmp_path)]).exit_code == 0


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match=r'format is "csv"\. Choose one of: parquet, npy'):
        check_format("csv")
