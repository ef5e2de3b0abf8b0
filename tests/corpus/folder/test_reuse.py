import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from features import contents, to_first_format
from rotten import encode, pixels, write_good

import packvit
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder import taking
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits, read_manifest, write_commits, write_manifest
from packvit.corpus.job import embed
from packvit.corpus.progress import Summary
from packvit.encoder import Encoder

INPUTS, ROWS, CHANGED = 20, 6, 3


@pytest.fixture(scope="module")
def invariant(checkpoint: Path) -> Encoder:
    return packvit.load(checkpoint, device="cpu", invariant=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, INPUTS)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "link.jpg").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """The photographs later: one is new, one gone, two renamed, one doubled, and two edited."""
    folder = tmp_path_factory.mktemp("later") / "photos"
    shutil.copytree(photos, folder, symlinks=True)
    names = sorted(path.name for path in folder.glob("good*"))
    (folder / names[2]).unlink()
    (folder / names[3]).rename(folder / "aaa.jpg")
    (folder / names[9]).rename(folder / "zzz.jpg")
    shutil.copy(folder / names[5], folder / "copy.jpg")
    for name, seed in (("new.png", 50), (names[7], 51), ("link.jpg", 52)):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(encode(pixels(40, 60, seed), "PNG"))
    return folder


def job(photos: Path, out: Path, encoder: Encoder, **options: Any) -> Summary:
    options = {"rows_per_part": ROWS, "workers": 1, "tokens": True, **options}
    return embed(photos, out=out, model=encoder, **options)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, photos: Path, invariant: Encoder) -> Path:
    out = tmp_path_factory.mktemp("before") / "out"
    job(photos, out, invariant)
    return out


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, changed: Path, invariant: Encoder) -> Path:
    out = tmp_path_factory.mktemp("fresh") / "out"
    job(changed, out, invariant, format="npy")
    return out


def test_rows_taken_over_give_the_bytes_of_a_fresh_job_with_an_invariant_encoder(
    tmp_path: Path, changed: Path, before: Path, fresh: Path, invariant: Encoder
):
    out = tmp_path / "out"
    summary = job(changed, out, invariant, format="npy", reuse=[before])
    assert contents(out) == contents(fresh)
    assert (summary.rows, summary.ok, summary.errors) == (23, 22, {"unidentified": 1})
    assert summary.reused == summary.ok - CHANGED
    again = job(changed, out, invariant, format="npy", reuse=[before])
    assert (again.kept_rows, again.reused) == (23, 0)
    assert contents(out) == contents(fresh)


@pytest.mark.parametrize("source", ["other parts", "first format", "half done", "shards", "two"])
def test_rows_are_taken_over_from_folders_of_any_kind(
    tmp_path: Path, photos: Path, changed: Path, fresh: Path, invariant: Encoder, source: str
):
    folders, reused = [tmp_path / "source"], INPUTS - 1
    if source == "other parts":
        job(photos, folders[0], invariant, rows_per_part=4, token_budget=2048)
    elif source == "shards":
        folders = [tmp_path / "1", tmp_path / "2"]
        for folder in folders:
            job(photos, folder, invariant, shard=f"{folder.name}/2")
    elif source == "two":
        folders = [tmp_path / "new", tmp_path / "old"]
        job(changed, folders[0], invariant)
        job(photos, folders[1], invariant)
        reused = 22
    else:
        job(photos, folders[0], invariant)
    if source == "first format":
        to_first_format(folders[0])
    if source == "half done":
        write_commits(folders[0], read_commits(folders[0])[:2])
        manifest = read_manifest(folders[0])
        assert manifest
        write_manifest(folders[0], manifest | {"complete": False, "counts": None})
        reused = None
    summary = job(changed, tmp_path / "out", invariant, format="npy", reuse=folders)
    assert contents(tmp_path / "out") == contents(fresh)
    if reused is not None:
        assert summary.reused == reused
    else:
        assert 0 < summary.reused < 2 * ROWS


def test_processes_take_rows_over_as_one_does_and_shards_do(
    tmp_path: Path, photos: Path, changed: Path, checkpoint: Path
):
    same = {"model": checkpoint, "device": "cpu", "rows_per_part": ROWS, "workers": 1}
    embed(photos, out=tmp_path / "before", invariant=True, **same)
    embed(changed, out=tmp_path / "fresh", invariant=True, **same)
    reuse = {"reuse": [tmp_path / "before"], "invariant": True}
    done = embed(changed, out=tmp_path / "two", processes=2, **reuse, **same)
    assert done.reused == 22 - CHANGED
    assert contents(tmp_path / "two") == contents(tmp_path / "fresh")
    for number in (1, 2):
        embed(changed, out=tmp_path / str(number), shard=f"{number}/2", **reuse, **same)
    packvit.merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "fresh")


def test_without_invariance_the_manifest_says_what_was_reused_and_the_rows_are_those_taken(
    tmp_path: Path, photos: Path, changed: Path, encoder: Encoder
):
    job(photos, tmp_path / "before", encoder)
    job(changed, tmp_path / "out", encoder, reuse=[tmp_path / "before"], token_budget=2048)
    old, manifest = read_manifest(tmp_path / "before"), read_manifest(tmp_path / "out")
    assert old
    assert manifest
    assert manifest["reused"] == {
        "fingerprints": [old["fingerprint"]],
        "across_versions": False,
        "trust_mtime": False,
    }
    assert not check_folder(tmp_path / "out").faults
    rows = {
        row["sha256"]: (row["pooled"], row["tokens"])
        for row in pq.read_table(tmp_path / "before/data").to_pylist()
        if row["status"] == "ok"
    }
    taken = [
        (row["pooled"], row["tokens"]) == rows[row["sha256"]]
        for row in pq.read_table(tmp_path / "out/data").to_pylist()
        if row["sha256"] in rows
    ]
    assert len(taken) == INPUTS - 1
    assert all(taken)
    job(changed, tmp_path / "third", encoder, reuse=[tmp_path / "out"], token_budget=2048)
    assert (read_manifest(tmp_path / "third") or {})["reused"]


def test_a_folder_that_is_embedded_otherwise_during_the_job_gives_it_no_rows(
    tmp_path: Path, photos: Path, before: Path, invariant: Encoder, monkeypatch: pytest.MonkeyPatch
):
    source, other = shutil.copytree(before, tmp_path / "source"), tmp_path / "other"
    job(photos, other, invariant, max_patches=16)  # its parts have the same rows
    read = taking.read_part

    def late(path: Path) -> Any:
        if other.exists():
            shutil.rmtree(source)
            other.rename(source)
        return read(path)

    monkeypatch.setattr(taking, "read_part", late)
    with pytest.raises(WriteError, match=r"source was embedded anew during the job\."):
        job(photos, tmp_path / "out", invariant, reuse=[source])
    assert not read_commits(tmp_path / "out")


def test_rows_with_errors_are_embedded_again(
    tmp_path: Path, photos: Path, before: Path, invariant: Encoder
):
    summary = job(photos, tmp_path / "out", invariant, reuse=[before])
    assert summary.reused == INPUTS  # and not the broken file, whose bytes are equal too
    assert summary.errors == {"missing": 1, "unidentified": 1}


def test_folders_that_cannot_be_reused_are_refused_with_what_differs(
    tmp_path: Path, photos: Path, before: Path, invariant: Encoder, encoder: Encoder
):
    other = shutil.copytree(before, tmp_path / "other")
    manifest = read_manifest(other)
    assert manifest
    versions = {**manifest["versions"], "torch": "1.0"}
    write_manifest(other, manifest | {"versions": versions})
    damaged = shutil.copytree(before, tmp_path / "damaged")
    with (damaged / "data/part-00001.parquet").open("r+b") as file:
        file.truncate(100)
    out = tmp_path / "out"
    for options, used, said in (
        ({"reuse": [before], "max_patches": 16}, invariant, "max_patches: 1024 -> 16"),
        ({"reuse": [before], "tokens": False}, invariant, 'lists: ["tokens"] -> []'),
        ({"reuse": [before]}, encoder, "invariant: true -> false"),
        ({"reuse": [other]}, invariant, 'were written by other versions: torch: "1.0" -> '),
        ({"reuse": [photos]}, invariant, "is not a feature folder"),
        ({"reuse": [tmp_path / "none"]}, invariant, "is not a feature folder"),
        ({"reuse": [damaged]}, invariant, "part-00001.parquet is missing or damaged"),
        ({"trust_mtime": True, "shard": "1/2"}, invariant, "cannot go with `shard`"),
    ):
        with pytest.raises(UsageError) as error:
            job(photos, out, used, **options)
        assert said in str(error.value)
        assert not list(out.glob("data/*"))
    with pytest.raises(UsageError, match=r"the folder of this job\. Ask for `update`"):
        job(photos, before, invariant, reuse=[before])
    summary = job(photos, out, invariant, reuse=[other], reuse_across_versions=True)
    assert summary.reused == INPUTS
    said = (read_manifest(out) or {})["reused"]
    assert said["across_versions"]
    with pytest.raises(UsageError, match="it took over rows of other versions itself"):
        job(photos, tmp_path / "third", invariant, reuse=[out])


def test_a_trusted_time_of_change_keeps_a_file_from_being_read_and_the_manifest_says_so(
    tmp_path: Path, photos: Path, invariant: Encoder
):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder, symlinks=True)
    names = sorted(path.name for path in folder.glob("good*"))
    for name in names[1:]:
        os.utime(folder / name, (1e9, 1e9))  # and the first has only just changed
    job(folder, tmp_path / "first", invariant, trust_mtime=True)
    assert not check_folder(tmp_path / "first").faults
    assert "reused" not in (read_manifest(tmp_path / "first") or {})

    def spoil(name: str, when: float) -> None:
        data = bytearray((folder / name).read_bytes())
        data[:4] = b"none"
        (folder / name).write_bytes(data)
        os.utime(folder / name, (when, when))

    before = (folder / names[0]).stat().st_mtime
    spoil(names[0], before)  # its time was not believed
    spoil(names[1], 1e9)  # nobody can tell
    spoil(names[2], 2e9)
    (folder / names[3]).write_bytes((folder / names[3]).read_bytes())
    (folder / names[4]).rename(folder / "renamed.jpg")
    trusting = {"reuse": [tmp_path / "first"], "trust_mtime": True}
    summary = job(folder, tmp_path / "second", invariant, **trusting)
    manifest = read_manifest(tmp_path / "second")
    assert manifest
    assert manifest["reused"]["trust_mtime"] is True
    found = packvit.read(tmp_path / "second")
    status = dict(zip(found.ids, found.statuses, strict=True))
    assert [status[name] for name in names[:4]] == ["unidentified", "ok", "unidentified", "ok"]
    assert status["renamed.jpg"] == "ok"
    assert summary.reused == INPUTS - 2
    strict = job(folder, tmp_path / "third", invariant, reuse=[tmp_path / "second"])
    assert strict.errors["unidentified"] == 4
    damaged = tmp_path / "second/_mtimes.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [fault.file for fault in check_folder(tmp_path / "second").faults] == [damaged.name]


def test_a_job_that_reuses_resumes_to_the_same_bytes(
    tmp_path: Path, changed: Path, before: Path, fresh: Path, invariant: Encoder
):
    out = tmp_path / "out"
    job(changed, out, invariant, format="npy", reuse=[before])
    entries = read_commits(out)
    write_commits(out, [entries[0], *entries[2:]])
    write_manifest(out, (read_manifest(out) or {}) | {"complete": False, "counts": None})
    (out / ".known.tmp").write_bytes(b"left by a killed job")
    summary = job(changed, out, invariant, format="npy", reuse=[before])
    assert 0 < summary.reused <= ROWS
    assert contents(out) == contents(fresh)


def test_vectors_of_reused_rows_are_the_same_numbers_read_by_numpy(
    tmp_path: Path, changed: Path, before: Path, fresh: Path, invariant: Encoder
):
    job(changed, tmp_path / "out", invariant, reuse=[before])
    found, expected = packvit.read(tmp_path / "out"), np.load(fresh / "_exports/pooled.npy")
    np.testing.assert_array_equal(found.matrix, expected)
