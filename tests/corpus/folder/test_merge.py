import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from features import contents
from rotten import write_good

import packvit
from packvit.cli import main
from packvit.corpus import UsageError, WriteError
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits, read_manifest, write_manifest
from packvit.corpus.folder.merging import merge
from packvit.corpus.folder.sharding import JobShard, parse_shard
from packvit.corpus.job import embed
from packvit.corpus.settings import choose_rows
from packvit.encoder import Encoder

INPUTS, ROWS, PARTS = 23, 4, 6


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, INPUTS - 3)
    (folder / "000a.jpg").write_bytes(b"no image")
    for number in (5, 15):
        (folder / f"{number:03}a.jpg").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def one_job(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    return job(photos, tmp_path_factory.mktemp("one") / "out", encoder, format="npy")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    """The folders 1, 2 and 3 of three shards."""
    folder = tmp_path_factory.mktemp("apart")
    for number in (1, 2, 3):
        job(photos, folder / str(number), encoder, shard=f"{number}/3")
    return folder


@pytest.fixture
def shards(tmp_path: Path, apart: Path) -> list[Path]:
    """A copy of the three shards, to be spoilt."""
    return [shutil.copytree(apart / name, tmp_path / name) for name in "123"]


def job(photos: Path, out: Path, encoder: Encoder, **options: Any) -> Path:
    options = {"rows_per_part": ROWS, "workers": 1, "tokens": True, **options}
    embed(photos, out=out, model=encoder, **options)
    return out


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_merged_shards_are_byte_for_byte_the_folder_of_one_job(
    tmp_path: Path, photos: Path, one_job: Path, encoder: Encoder, count: int
):
    folders = [
        job(photos, tmp_path / str(number), encoder, shard=f"{number}/{count}")
        for number in range(1, count + 1)
    ]
    merged = merge(folders[::-1], out=tmp_path / "out", format="npy")
    assert contents(tmp_path / "out") == contents(one_job)
    assert (merged.rows, merged.ok, merged.parts) == (INPUTS, INPUTS - 3, PARTS)
    assert merged.errors == {"missing": 2, "unidentified": 1}
    assert not check_folder(tmp_path / "out").faults


def test_shards_are_runs_of_parts_that_cover_a_job_once_and_differ_by_one_part_at_most():
    for parts in (0, 1, 7, 64, 1000):
        for count in (1, 2, 7, 64, 99):
            runs = [JobShard(number, count).parts(parts) for number in range(1, count + 1)]
            assert [number for run in runs for number in run] == list(range(parts))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize("written", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3 ", "01/3", ""])
def test_a_shard_that_does_not_exist_is_refused(written: str):
    with pytest.raises(UsageError, match=r"but must be K/N with K from 1 to N, such as 3/64\."):
        parse_shard(written)


def test_the_rows_of_a_shards_part_do_not_depend_on_the_device(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    gpu = torch.device("cuda")
    for inputs in (10, 5_000, 10**6):
        assert choose_rows(None, inputs, large=False) == choose_rows(gpu, inputs, large=False)
    embed(photos, out=tmp_path / "out", model=encoder, workers=1, shard="1/2")
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert manifest["rows_per_part"] == choose_rows(gpu, INPUTS, large=False)


def test_a_shard_is_checked_and_resumed_and_not_read_alone(
    photos: Path, apart: Path, shards: list[Path], encoder: Encoder
):
    assert not check_folder(shards[1]).faults
    lost = read_commits(shards[1])[0].part
    (shards[1] / lost).unlink()
    assert [fault.file for fault in check_folder(shards[1]).faults][:1] == [lost]
    job(photos, shards[1], encoder, shard="2/3")
    assert contents(shards[1]) == contents(apart / "2")
    with pytest.raises(UsageError, match=r"holds shard 2/3 of a job\. Put all shards"):
        packvit.read(shards[1])
    with pytest.raises(UsageError, match=r"shard\.number: 2 -> 1"):
        job(photos, shards[1], encoder, shard="1/3")
    with pytest.raises(UsageError, match='format is "npy", which a shard alone cannot have'):
        job(photos, shards[1], encoder, shard="2/3", format="npy")


def change(folder: Path, **entries: Any) -> None:
    """Change entries of a manifest, as a job of other circumstances would have written them."""
    write_manifest(folder, (read_manifest(folder) or {}) | entries)


def test_shards_that_are_not_those_of_one_job_are_refused_in_one_sentence(
    tmp_path: Path, photos: Path, shards: list[Path], one_job: Path, encoder: Encoder
):
    first, second, third = shards
    more = job(photos, tmp_path / "more", encoder, shard="2/3", max_patches=16)
    fewer = job(photos, tmp_path / "fewer", encoder, shard="2/4")
    other = tmp_path / "other"
    shutil.copytree(photos, other, symlinks=True)
    (other / "zzz.jpg").write_bytes(b"another")
    listed = job(other, tmp_path / "listed", encoder, shard="2/3")
    gpu = shutil.copytree(second, tmp_path / "gpu")
    change(gpu, device_names=["NVIDIA H200"])
    newer = shutil.copytree(second, tmp_path / "newer")
    change(newer, versions={**(read_manifest(second) or {})["versions"], "torch": "99.1"})
    half = shutil.copytree(second, tmp_path / "half")
    change(half, complete=False, counts=None)
    (tmp_path / "empty").mkdir()
    for folders, said in (
        ([first, second], "Of 3 shards 1 are not given: 3/3."),
        ([third], "Of 3 shards 2 are not given: 1/3, 2/3."),
        ([first, second, first, third], f"{first} and {first} are both shard 1/3."),
        ([first, more, third], f"{more} is a shard of another job than {first}: "),
        ([first, more, third], "preprocessing.max_patches: 1024 -> 16"),
        ([first, fewer, third], f"{fewer} is shard 2/4 and {first} is shard 1/3"),
        ([first, listed, third], f"inputs: {INPUTS} -> {INPUTS + 1}"),
        ([first, gpu, third], '-> ["NVIDIA H200"].'),
        ([first, newer, third], '-> "99.1".'),
        ([first, half, third], f"{half} is half done: 8 of 8 rows are written."),
        ([first, one_job, third], f"{one_job} holds a whole job, and no shard of one."),
        ([first, tmp_path / "empty", third], f"{tmp_path / 'empty'} is not a feature folder"),
        ([first, tmp_path / "none", third], f"{tmp_path / 'none'} does not exist."),
        ([], "No folder is given."),
    ):
        with pytest.raises(UsageError) as error:
            merge(folders, out=tmp_path / "out")
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="is a shard itself"):
        merge([first, second, third], out=second, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_shards_whose_photographs_lay_elsewhere_are_merged_with_the_root_of_the_first(
    tmp_path: Path, shards: list[Path], one_job: Path
):
    for number, folder in enumerate(shards):
        manifest = read_manifest(folder) or {}
        there = {**manifest["root"], "path": f"/machine-{number}/photos"}
        write_manifest(folder, manifest | {"root": there})
    merge(shards[::-1], out=tmp_path / "out", format="npy")
    one, out = read_manifest(one_job) or {}, read_manifest(tmp_path / "out") or {}
    assert out == one | {"root": {**one["root"], "path": "/machine-0/photos"}}


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "unlist"])
def test_a_damaged_part_is_refused_and_once_embedded_again_the_merge_goes_on(
    tmp_path: Path, photos: Path, shards: list[Path], one_job: Path, encoder: Encoder, spoil: str
):
    entry = read_commits(shards[1])[1]
    part, log = shards[1] / entry.part, shards[1] / "_commits.jsonl"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    if spoil == "flip":
        part.write_bytes(data)
    elif spoil == "cut":
        part.write_bytes(data[:-1])
    elif spoil == "remove":
        part.unlink()
    else:
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UsageError) as error:
        merge(shards, out=tmp_path / "out", format="npy")
    assert entry.part in str(error.value)
    assert not list((tmp_path).glob("out/.*.tmp"))
    job(photos, shards[1], encoder, shard="2/3")
    merged = merge(shards, out=tmp_path / "out", format="npy")
    assert merged.kept_parts == (0 if spoil == "unlist" else 3)
    assert contents(tmp_path / "out") == contents(one_job)


def test_a_merge_resumes_over_a_killed_one_and_over_a_job_that_was_begun_there(
    tmp_path: Path, photos: Path, shards: list[Path], one_job: Path
):
    out = tmp_path / "out"
    shutil.copytree(one_job, out)
    (out / "data/part-00001.parquet").unlink()
    (out / "data/part-00003.parquet").write_bytes(b"PAR1")
    (out / "_exports/pooled.npy").unlink()
    change(out, complete=False, counts=None)
    assert merge(shards, out=out, format="npy").kept_parts == PARTS - 2
    assert contents(out) == contents(one_job)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    merge(shards, out=out, format="npy")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"} == before


@pytest.mark.parametrize("certified", [3, 2])
def test_the_certificate_of_the_first_shard_is_kept_if_all_have_one(
    tmp_path: Path, shards: list[Path], certified: int
):
    for folder in shards[:certified]:
        data = json.dumps({"machine": folder.name}).encode()
        (folder / "_certificate.json").write_bytes(data)
        change(folder, certificate_sha256=hashlib.sha256(data).hexdigest())
    out = tmp_path / "out"
    merge(shards, out=out)
    kept = out / "_certificate.json"
    assert not check_folder(out).faults
    assert kept.exists() == (certified == 3)
    assert certified < 3 or json.loads(kept.read_bytes()) == {"machine": "1"}


@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_a_certificate_that_is_not_the_recorded_one_is_refused(
    tmp_path: Path, shards: list[Path], spoil: str
):
    for folder in shards:
        (folder / "_certificate.json").write_bytes(b"{}")
        change(folder, certificate_sha256=hashlib.sha256(b"{}").hexdigest())
    kept = shards[0] / "_certificate.json"
    if spoil == "change":
        kept.write_bytes(b'{"passed": true}')
    else:
        kept.unlink()
    state = "missing" if spoil == "remove" else "not the one that the manifest records"
    with pytest.raises(UsageError, match=rf"_certificate\.json is {state}\. .* with --verify"):
        merge(shards, out=tmp_path / "out")
    assert not (tmp_path / "out" / "_certificate.json").exists()


def test_a_folder_that_others_write_or_fill_is_not_merged_into(
    tmp_path: Path, shards: list[Path], one_job: Path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_bytes(b"")
    with pytest.raises(UsageError, match="is not empty"):
        merge(shards, out=tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a folder"):
        merge(shards, out=tmp_path / "file")
    with pytest.raises(WriteError, match="could not be written"):
        merge(shards, out=tmp_path / "file/out")


def test_the_command_says_what_it_merged_and_exits_as_the_job_would(
    tmp_path: Path, shards: list[Path], one_job: Path
):
    named = [str(path) for path in shards]
    out = str(tmp_path / "out")
    found = CliRunner().invoke(main, ["merge", *named, "--out", out, "--format", "npy"])
    assert found.exit_code == 3
    assert found.stdout == f"{out}: 3 shards, 6 parts with 23 rows, 3 of them errors\n"
    assert contents(tmp_path / "out") == contents(one_job)
    found = CliRunner().invoke(main, ["merge", *named, "--out", out, "--json"])
    assert json.loads(found.stdout)["kept_parts"] == PARTS
    found = CliRunner().invoke(main, ["merge", *named[1:], "--out", out])
    assert found.exit_code == 2
    assert found.stderr == "Error: Of 3 shards 1 are not given: 1/3.\n"
