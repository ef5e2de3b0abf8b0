"""`packvit.read`: what a finished folder holds, of either format, and what is refused."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from features import contents, to_first_format
from rotten import write_good

import packvit
from packvit.corpus import UsageError
from packvit.corpus.folder import reader
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import (
    read_commits,
    read_manifest,
    write_commits,
    write_manifest,
)
from packvit.corpus.job import embed
from packvit.encoder import Encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    names = write_good(folder, 5)
    for number in range(15):
        os.link(folder / names[number % 5], folder / f"{number:03}.jpg")
    (folder / "005a.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    embed(photos, out=out, model=encoder, taps=(0,), rows_per_part=8, format="npy")
    return out


@pytest.fixture
def out(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def same(out: Path) -> Path:
    return out


def without_matrix(out: Path) -> Path:
    (out / "_exports/pooled.npy").unlink()
    return out


@pytest.mark.parametrize("form", [same, to_first_format, without_matrix])
def test_a_folder_of_either_format_reads_as_pyarrow_reads_its_parts(
    out: Path, form: Callable[[Path], Path]
):
    rows = pq.read_table(out / "data").to_pylist()
    found = packvit.read(str(form(out)))
    assert found.ids == tuple(row["id"] for row in rows)
    assert found.statuses == tuple(row["status"] for row in rows)
    assert found.table.to_pylist() == rows
    assert "tap_0" in found.table.column_names
    width = len(rows[0]["pooled"])
    pooled = np.array([row["pooled"] or [np.nan] * width for row in rows], np.float32)
    assert np.array_equal(found.matrix, pooled, equal_nan=True)
    assert (found.matrix.shape, found.matrix.dtype) == ((21, width), np.float32)
    assert isinstance(found.matrix, np.memmap) == (form is not without_matrix)


def test_good_keeps_the_rows_that_are_ok_and_nothing_else(out: Path):
    rows = [row for row in pq.read_table(out / "data").to_pylist() if row["status"] == "ok"]
    good = packvit.read(out).good()
    assert len(good) == len(rows) == 20
    assert good.ids == tuple(row["id"] for row in rows)
    assert set(good.statuses) == {"ok"}
    assert good.table.to_pylist() == rows
    assert np.array_equal(good.matrix, np.array([row["pooled"] for row in rows], np.float32))
    assert good.good().ids == good.ids


def test_writing_to_the_matrix_does_not_reach_the_file(out: Path):
    before = contents(out)
    packvit.read(out).matrix[:] = 0
    assert contents(out) == before


def test_a_folder_of_the_first_format_is_resumed_and_checked_in_its_own_names(
    tmp_path: Path, out: Path, photos: Path, encoder: Encoder
):
    whole = to_first_format(out)
    assert check_folder(whole).faults == []
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    (resumed / "part-00001.parquet").unlink()
    (resumed / "pooled.npy").unlink()
    (resumed / ".part-00002.parquet.tmp").touch()
    assert any(fault.file == "part-00001.parquet" for fault in check_folder(resumed).faults)
    done = embed(photos, out=resumed, model=encoder, taps=(0,), format="npy")
    assert done.kept_rows == 13
    assert contents(resumed) == contents(whole)
    assert check_folder(resumed).faults == []


def test_starting_over_in_a_folder_of_the_first_format_leaves_nothing_of_it(
    tmp_path: Path, out: Path, photos: Path, encoder: Encoder
):
    embed(photos, out=to_first_format(out), model=encoder, overwrite=True)
    embed(photos, out=tmp_path / "new", model=encoder)
    assert contents(out) == contents(tmp_path / "new")
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "new"))


def stop_early(out: Path) -> None:
    write_manifest(out, (read_manifest(out) or {}) | {"complete": False, "counts": None})
    write_commits(out, ())


def cut_matrix(out: Path) -> None:
    os.truncate(out / "_exports/pooled.npy", 200)


def claim_rows(out: Path) -> None:
    """Have the manifest and the log tell of more rows than memory holds."""
    rows, last = 10**15, read_commits(out)[-1]
    write_commits(out, [*read_commits(out)[:-1], replace(last, rows=rows - 21 + last.rows)])
    write_manifest(out, (read_manifest(out) or {}) | {"inputs": rows, "exports": {}})


def claim_width(out: Path) -> None:
    manifest = read_manifest(out) or {}
    config = manifest["config"] | {"width": 1 << 20}
    write_manifest(out, manifest | {"config": config, "exports": {}})


def flip_ids(out: Path) -> None:
    data = bytearray((out / "data/part-00001.parquet").read_bytes())
    data[60] ^= 1
    (out / "data/part-00001.parquet").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "out does not exist. Name a feature folder that `packvit embed` wrote."),
        (lambda out: (out / "_manifest.json").unlink(), "out is not a feature folder: it has no _"),
        (lambda out: (out / "_manifest.json").write_text("{}"), "out is not a feature folder: it"),
        (
            stop_early,
            "out is half done: 0 of 21 rows are written. Run the same embed command again",
        ),
        (lambda out: write_commits(out, ()), "_commits.jsonl is missing or damaged. `packvit che"),
        (
            lambda out: (out / "data/part-00002.parquet").unlink(),
            "part-00002.parquet is missing or",
        ),
        (flip_ids, "data/part-00001.parquet is missing or damaged. `packvit check"),
        (claim_rows, "data/part-00002.parquet is missing or damaged. `packvit check"),
        (claim_width, "data/part-00000.parquet is missing or damaged. `packvit check"),
        (cut_matrix, "_exports/pooled.npy is missing or damaged. `packvit check"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(
    out: Path, damage: Callable[[Path], object], message: str
):
    damage(out)
    with pytest.raises(UsageError) as refused:
        packvit.read(out)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def other(tmp_path: Path, finished: Path, photos: Path, encoder: Encoder) -> Path:
    """A folder of the same rows, of which some have other vectors."""
    changed = shutil.copytree(photos, tmp_path / "changed")
    for name in ("000.jpg", "012.jpg"):  # of two parts
        shutil.copy(photos / "001.jpg", changed / name)
    embed(changed, out=tmp_path / "other", model=encoder, taps=(0,), rows_per_part=8)
    return tmp_path / "other"


@pytest.mark.parametrize("form", [same, without_matrix])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_as_the_new_one(
    out: Path, other: Path, form: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
):
    form(out)
    wanted, read = packvit.read(other), reader.read_whole

    def swapping(folder: Path, part: str, columns: list[str] | None = None) -> Any:
        table = read(folder, part, columns)
        if other.exists():  # once a part of the old folder is read
            shutil.rmtree(out)
            other.rename(out)
        return table

    monkeypatch.setattr(reader, "read_whole", swapping)
    found = packvit.read(out)
    assert (found.ids, found.statuses) == (wanted.ids, wanted.statuses)
    assert np.array_equal(found.matrix, wanted.matrix, equal_nan=True)


def test_a_folder_that_is_replaced_while_its_manifest_is_read_is_not_called_damaged(
    out: Path, other: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted, read = packvit.read(other), reader.read_own

    def late(path: Path, most: int) -> bytes:
        if other.exists():
            shutil.rmtree(out)
            other.rename(out)
        return read(path, most)

    monkeypatch.setattr(reader, "read_own", late)
    assert packvit.read(out).ids == wanted.ids


def test_rows_of_a_folder_that_was_replaced_since_are_not_given_for_those_that_were_read(
    out: Path, other: Path
):
    found = packvit.read(out)
    shutil.rmtree(out)
    other.rename(out)
    with pytest.raises(UsageError) as refused:
        _ = found.table
    assert "out changed while it was read: a job writes to it. Read it again." in str(refused.value)
