"""A job that was killed, or whose folder was damaged, ends as if nothing had happened."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from features import contents
from rotten import write_good

from packvit.corpus import UsageError
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import (
    CHECKSUM,
    claim,
    read_commits,
    read_manifest,
    stage,
    write_commits,
)
from packvit.corpus.folder.parts import read_part
from packvit.corpus.job import embed
from packvit.corpus.progress import Progress
from packvit.encoder import Encoder

INPUTS, PARTS = 400, 7  # 64 inputs a part, since tokens are written

# Forks a job of its own session for each line on stdin, and kills all of it so many seconds after
# so many parts were committed.
KILLER = r"""
import json, os, signal, sys, time
import torch, packvit
torch.set_num_threads(1)
encoder = packvit.load(sys.argv[1], device="cpu")
print("ready", flush=True)
for line in sys.stdin:
    photos, out, parts, seconds = json.loads(line)
    job = os.fork()
    if not job:
        os.setsid()
        packvit.embed(photos, out=out, model=encoder, tokens=True, workers=2)
        os._exit(0)
    log = os.path.join(out, "_commits.jsonl")
    while parts and (not os.path.exists(log) or open(log, "rb").read().count(b"\n") < parts):
        time.sleep(0.001)
    time.sleep(seconds)
    try:
        os.killpg(job, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to setsid
        os.kill(job, signal.SIGKILL)
    os.waitpid(job, 0)
    print("dead", flush=True)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    names = write_good(folder, 7)
    for number in range(INPUTS - 10):
        os.link(folder / names[number % 7], folder / f"{number:03}.jpg")
    for name in ("100a.jpg", "200a.jpg", "300a.jpg"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photos: Path, encoder: Encoder) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = embed(photos, out=out, model=encoder, tokens=True)
    assert (done.rows, done.errors) == (INPUTS, {"unidentified": 3})
    assert len(read_commits(out)) == PARTS
    return out


def states(out: Path) -> dict[str, tuple[int, int]]:
    """Return of every file what changes when it is written, with the same bytes or others."""
    paths = {str(path.relative_to(out)): path.stat() for path in [out, *out.rglob("*")]}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in paths.items()}


def resume(photos: Path, out: Path, encoder: Encoder, **options: Any) -> list[Progress]:
    told: list[Progress] = []
    embed(photos, out=out, model=encoder, tokens=True, progress=told.append, **options)
    return told


def kill_and_resume(
    tmp_path: Path, photos: Path, checkpoint: Path, encoder: Encoder, expected: Path, moments: int
) -> list[int]:
    """Kill and resume a job at random moments; return how many parts each had committed."""
    times = {0: 0.0}  # when so many rows were committed; starting the workers is no part's time

    def tell(progress: Progress) -> None:
        times.setdefault(progress.committed, time.monotonic())

    embed(photos, out=tmp_path / "timed", model=encoder, tokens=True, workers=2, progress=tell)
    # A quarter of what a part takes here, where shapes are checked: a job of its own is faster.
    seconds = (times[INPUTS] - times[64]) / (PARTS - 1) / 4
    draw, committed = random.Random(0), []
    with subprocess.Popen(
        [sys.executable, "-c", KILLER, str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as killer:
        assert killer.stdin
        assert killer.stdout
        assert killer.stdout.readline() == "ready\n"
        for moment in range(moments):
            out = tmp_path / str(moment)
            job = [str(photos), str(out), moment * PARTS // moments, seconds * draw.random()]
            killer.stdin.write(json.dumps(job) + "\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "dead\n"
            committed.append(len(read_commits(out)))
            told = resume(photos, out, encoder)
            assert contents(out) == contents(expected)
            assert told[0].committed == min(INPUTS, 64 * committed[-1])
        killer.stdin.close()
    return committed


@pytest.mark.soak
def test_a_job_killed_at_any_moment_ends_as_an_undisturbed_one(
    tmp_path: Path, photos: Path, checkpoint: Path, encoder: Encoder, undisturbed: Path
):
    committed = kill_and_resume(tmp_path, photos, checkpoint, encoder, undisturbed, 4)
    assert any(0 < parts < PARTS for parts in committed)


@pytest.mark.soak
def test_a_job_killed_at_twenty_moments_ends_as_an_undisturbed_one(
    tmp_path: Path, photos: Path, checkpoint: Path, encoder: Encoder, undisturbed: Path
):
    committed = kill_and_resume(tmp_path, photos, checkpoint, encoder, undisturbed, 20)
    assert len(set(committed)) > 3


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def unquote(data: bytes) -> bytes:
    return data.replace(b'"', b"", 1)


def test_a_finished_job_reads_no_image_and_changes_nothing(
    tmp_path: Path, encoder: Encoder, capfd: pytest.CaptureFixture[str]
):
    photos = tmp_path / "photos"
    names = [str(photos / name) for name in write_good(photos, 5)]
    (photos / "bad.jpg").touch()
    names.append(str(photos / "bad.jpg"))
    first = embed(names, out=tmp_path / "out", model=encoder)
    before, held = states(tmp_path / "out"), contents(tmp_path / "out")
    shutil.rmtree(photos)  # inputs that are named are inputs whether they are there or not
    again = embed(names, out=tmp_path / "out", model=encoder)
    assert (states(tmp_path / "out"), contents(tmp_path / "out")) == (before, held)
    assert (again.rows, again.ok, again.errors, again.examples, again.tokens) == (
        (first.rows, first.ok, first.errors, first.examples, first.tokens)
    )
    assert (first.kept_rows, again.kept_rows, again.images_per_second) == (0, 6, 0)


def test_a_job_resumed_after_its_photographs_moved_says_where_they_are_now(
    tmp_path: Path, encoder: Encoder
):
    write_good(tmp_path / "before", 2)
    embed(tmp_path / "before", out=tmp_path / "out", model=encoder)
    held, before = contents(tmp_path / "out"), read_manifest(tmp_path / "out") or {}
    (tmp_path / "before").rename(tmp_path / "after")
    assert embed(tmp_path / "after", out=tmp_path / "out", model=encoder).kept_rows == 2
    now, after = contents(tmp_path / "out"), read_manifest(tmp_path / "out") or {}
    assert [name for name in held if now[name] != held[name]] == ["_manifest.json"]
    assert after == before | {"root": {**before["root"], "path": str(tmp_path / "after")}}


def test_kept_parts_are_not_read_again_and_not_written_again(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    own = shutil.copytree(photos, tmp_path / "photos")
    lines = (out / "_commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "_commits.jsonl").write_bytes(b"".join(lines[:5]))
    listed = sorted(os.listdir(own))
    for name in listed[: 5 * 64]:
        (own / name).write_bytes(b"not what was embedded")
    before = states(out)
    told = resume(own, out, encoder)
    manifest, whole = read_manifest(out) or {}, read_manifest(undisturbed) or {}
    assert manifest | {"root": None} == whole | {"root": None}  # the photographs are elsewhere
    one, other = contents(out), contents(undisturbed)
    assert one | {"_manifest.json": b""} == other | {"_manifest.json": b""}
    assert told[0].committed == told[0].settled == 5 * 64
    after = states(out)
    kept = [f"data/part-{number:05}.parquet" for number in range(5)]
    assert all(after[name] == before[name] for name in kept)
    # A part without a line is not believed.
    assert after["data/part-00005.parquet"] != before["data/part-00005.parquet"]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_a_killed_job_left_half_written_is_taken_back(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path, cut: int
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    change(out / "_commits.jsonl", lambda data: data[:-cut])
    for name in ("part-00006.parquet", "_manifest.json", "_commits.jsonl"):
        (out / f".{name}.tmp").write_bytes(b"half")
    told = resume(photos, out, encoder)
    assert contents(out) == contents(undisturbed)
    assert (told[0].notes, told[0].committed) == ((), 6 * 64)


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (
            lambda out: (out / "data/part-00002.parquet").unlink(),
            "data/part-00002.parquet is missing; it",
        ),
        (
            lambda out: change(out / "data/part-00002.parquet", flip),
            "is damaged: its sha256 is not",
        ),
        (
            lambda out: change(out / "data/part-00002.parquet", lambda d: d[:-1]),
            "but [0-9,]+ were comm",
        ),
        (lambda out: change(out / "_commits.jsonl", flip), "damaged|committed"),
        (lambda out: change(out / "_commits.jsonl", unquote), "line of _commits.jsonl is damaged"),
        (lambda out: (out / "_commits.jsonl").unlink(), None),
    ],
    ids=["missing", "flipped", "cut", "flipped log", "torn log", "no log"],
)
def test_damage_to_a_finished_folder_is_told_and_mended(
    tmp_path: Path,
    photos: Path,
    encoder: Encoder,
    undisturbed: Path,
    damage: Callable[[Path], None],
    note: str | None,
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    damage(out)
    told = resume(photos, out, encoder)
    assert contents(out) == contents(undisturbed)
    if note:
        (found,) = told[0].notes
        assert re.search(note, found)
        assert "embedded again." in found
        assert told[0].committed == INPUTS - 64


def test_a_job_that_is_killed_while_it_mends_loses_no_part_that_is_whole(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (out / "data/part-00001.parquet").unlink()
    with pytest.raises(KeyboardInterrupt):
        embed(photos, out=out, model=encoder, tokens=True, progress=interrupt)
    kept = [entry.part[10:15] for entry in read_commits(out)]
    assert kept == ["00000", "00002", "00003", "00004", "00005", "00006"]
    assert (read_manifest(out) or {})["complete"] is False
    resume(photos, out, encoder)
    assert contents(out) == contents(undisturbed)


def interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


def test_another_job_is_refused_with_every_difference_and_nothing_is_touched(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    before = states(out), contents(out)
    with pytest.raises(UsageError) as refused:
        embed(photos, out=out, model=encoder, tokens=True, max_patches=9, token_budget=64)
    assert str(refused.value).splitlines() == [
        f"{out} holds the features of another job. What differs, its -> yours:",
        "  preprocessing.max_patches: 1024 -> 9",
        "  token_budget: 16384 -> 64",
        "Give the same options to resume it, start over with `overwrite`, or choose another "
        "folder.",
    ]
    with pytest.raises(UsageError) as refused:
        embed(photos / "000.jpg", out=out, model=encoder, tokens=True)
    first, second, third = str(refused.value).splitlines()[1:-1]
    assert first.startswith("  inputs_sha256: ")
    assert second == f"  inputs: {INPUTS} -> 1"
    left = 'left out, or no longer there: "000.jpg", "001.jpg", "002.jpg" and '
    assert third.startswith(f"  inputs {left}")  # a finished job does not keep paths
    assert (states(out), contents(out)) == before


def test_what_was_flipped_in_a_manifest_is_shown_or_mended(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    change(out / "_manifest.json", lambda data: data.replace(b"float32", b"float3r"))
    with pytest.raises(UsageError, match='dtype: "float3r" -> "float32"'):
        resume(photos, out, encoder)
    checksum = json.loads((undisturbed / "_manifest.json").read_bytes())[CHECKSUM].encode()
    for good, bad in ((b'"ok": 397', b'"ok": 396'), (checksum, checksum[::-1])):
        shutil.copy(undisturbed / "_manifest.json", out)
        change(out / "_manifest.json", lambda data, g=good, b=bad: data.replace(g, b))
        assert contents(out) != contents(undisturbed)
        resume(photos, out, encoder)
        assert contents(out) == contents(undisturbed)


def test_overwrite_starts_over_and_removes_only_what_packvit_wrote(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(UsageError, match=r"it holds notes\.txt and 0 other files that packvit did"):
        embed(photos / "000.jpg", out=out, model=encoder, overwrite=True)
    assert contents(out) == before
    (out / "notes.txt").unlink()
    with claim(out), pytest.raises(UsageError, match="Another job is writing to"):
        embed(photos / "000.jpg", out=out, model=encoder, overwrite=True)
    embed(photos / "000.jpg", out=out, model=encoder, overwrite=True)
    embed(photos / "000.jpg", out=tmp_path / "new", model=encoder)
    assert contents(out) == contents(tmp_path / "new")


def test_a_file_of_anothers_in_a_job_s_folder_is_let_be(
    tmp_path: Path, photos: Path, encoder: Encoder, undisturbed: Path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (out / "data/part-00003.parquet").unlink()
    resume(photos, out, encoder)
    assert contents(out) == contents(undisturbed) | {"notes.txt": b"mine"}


def interrupt_second(photos: Path, out: Path, encoder: Encoder) -> None:
    """Stop a job after its second part."""

    def stop(progress: Progress) -> None:
        if progress.committed >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(photos, out=out, model=encoder, rows_per_part=64, progress=stop)


@pytest.fixture
def halfway(tmp_path: Path, photos: Path, encoder: Encoder) -> tuple[Path, Path]:
    """Photographs and the folder of an interrupted job of theirs."""
    copies, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copies, copy_function=os.link)
    interrupt_second(copies, out, encoder)
    return copies, out


def statuses(out: Path) -> dict[str, str]:
    tables = [read_part(out / entry.part, ["id", "status"]) for entry in read_commits(out)]
    return {row["id"]: row["status"] for table in tables for row in table.to_pylist()}


def test_an_input_that_is_removed_before_the_job_resumes_is_a_row(
    halfway: tuple[Path, Path], encoder: Encoder
):
    """V10"""
    photos, out = halfway
    assert (out / "_inputs.jsonl.gz").is_file()
    kept = {name: data for name, data in contents(out).items() if name.startswith("data/")}
    (photos / "010.jpg").unlink()  # in a part that is there
    (photos / "380.jpg").unlink()
    said: list[Progress] = []
    done = embed(photos, out=out, model=encoder, progress=said.append)
    assert said[0].notes[0] == '2 inputs of this job are no longer there: "010.jpg", "380.jpg".'
    assert (done.rows, done.errors) == (INPUTS, {"unidentified": 3, "missing": 1})
    assert statuses(out)["380.jpg"] == "missing"
    assert statuses(out)["010.jpg"] == "ok"
    assert {name: contents(out)[name] for name in kept} == kept
    assert not (out / "_inputs.jsonl.gz").exists()
    assert not check_folder(out).faults
    again = contents(out)
    with pytest.raises(UsageError, match=r'left out, or no longer there: "010\.jpg"'):
        embed(photos, out=out, model=encoder)  # its row has features: what should become of them?
    assert contents(out) == again


def test_a_job_whose_list_of_inputs_is_damaged_is_resumed(
    halfway: tuple[Path, Path], encoder: Encoder
):
    photos, out = halfway
    (photos / "010.jpg").rename(photos / "010a.jpg")
    path = out / "_inputs.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + b"\xff" * 20 + whole[60:])
    with pytest.raises(UsageError, match="holds the features of another job"):
        embed(photos, out=out, model=encoder)
    (photos / "010a.jpg").rename(photos / "010.jpg")
    done = embed(photos, out=out, model=encoder)
    assert (done.rows, done.errors, done.kept_rows) == (INPUTS, {"unidentified": 3}, 128)


def test_a_finished_job_with_rows_of_missing_inputs_is_finished(
    halfway: tuple[Path, Path], encoder: Encoder
):
    """V10"""
    photos, out = halfway
    (photos / "380.jpg").unlink()
    embed(photos, out=out, model=encoder)
    before = contents(out)
    assert embed(photos, out=out, model=encoder).errors["missing"] == 1
    assert contents(out) == before


def test_which_inputs_hinder_a_job_is_said(halfway: tuple[Path, Path], encoder: Encoder):
    """V10"""
    photos, out = halfway
    before = contents(out)
    (photos / "380.jpg").unlink()
    (photos / "new.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r'inputs no longer there: "380\.jpg"; new: "new\.jpg"'):
        embed(photos, out=out, model=encoder)
    (photos / "new.jpg").unlink()
    listed = photos.with_name("list.txt")
    listed.write_text("\n".join(str(photos / f"{n:03}.jpg") for n in range(200)))
    with pytest.raises(UsageError, match=r"left out though there: .*396 more; new: "):
        embed(lists=[listed], out=out, model=encoder)
    assert contents(out) == before


def test_rows_that_are_errors_are_done_again_and_no_others(
    tmp_path: Path, photos: Path, encoder: Encoder
):
    """S3, and point 6 of issue 16"""
    copies, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copies, copy_function=os.link)
    (copies / "050.jpg").unlink()
    (copies / "050.jpg").symlink_to("nowhere")
    common: dict[str, Any] = {
        "out": out,
        "model": encoder,
        "rows_per_part": 64,
        "tokens": True,
        "format": "npy",
    }
    first = embed(copies, **common)
    assert first.errors == {"unidentified": 3, "missing": 1}
    before = contents(out)
    for name in ("050.jpg", "100a.jpg", "200a.jpg"):
        (copies / name).unlink()
        os.link(photos / "000.jpg", copies / name)
    with pytest.raises(UsageError, match='retry_errors names "missed"'):
        embed(copies, **common, retry_errors=["missed"])
    assert embed(copies, **common, retry_errors=["missing"]).errors == {"unidentified": 3}
    changed = {name for name, data in contents(out).items() if data != before[name]}
    assert changed == {
        "data/part-00000.parquet", "_commits.jsonl", "_manifest.json",
        "_exports/pooled.npy", "_exports/ids.jsonl",
    }  # fmt: skip
    last = embed(copies, **common, retry_errors=True)
    assert (last.ok, last.errors) == (INPUTS - 1, {"unidentified": 1})
    assert not check_folder(out).faults
    common["out"] = tmp_path / "fresh"
    fresh = embed(copies, **common)
    assert fresh.errors == last.errors
    for mine, right in zip(read_commits(out), read_commits(tmp_path / "fresh"), strict=True):
        ours, theirs = read_part(out / mine.part), read_part(tmp_path / "fresh" / right.part)
        assert ours.schema == theirs.schema
        assert ours.drop(["pooled", "tokens"]) == theirs.drop(["pooled", "tokens"])
        for one, other in zip(ours["pooled"], theirs["pooled"], strict=True):
            assert one.as_py() == pytest.approx(other.as_py(), abs=1e-4) or not one.is_valid
    common["out"], same = out, contents(out)
    embed(copies, **common, retry_errors=["timeout"])
    assert contents(out) == same


def test_an_unfinished_job_does_its_errors_again_too(halfway: tuple[Path, Path], encoder: Encoder):
    """Point 6 of issue 16"""
    photos, out = halfway
    entry = read_commits(out)[1]
    assert "unidentified" in statuses(out).values()
    for name in ("100a.jpg", "200a.jpg", "300a.jpg"):
        (photos / name).unlink()
        os.link(photos / "000.jpg", photos / name)
    done = embed(photos, out=out, model=encoder, retry_errors=True)
    assert (done.ok, done.errors) == (INPUTS, {})
    assert read_commits(out)[1] != entry
    assert not check_folder(out).faults


def test_a_part_that_was_replaced_in_the_log_alone_is_renamed(
    tmp_path: Path, undisturbed: Path, photos: Path, encoder: Encoder
):
    """A kill between the log and the rename loses no row, though inputs may be gone."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    table = read_part(out / "data/part-00001.parquet")
    renamed = table.set_column(3, "note", pa.array(["again"] * len(table)))
    staged = stage(out, 1, renamed)
    others = [entry for entry in read_commits(out) if entry.part != staged.entry.part]
    write_commits(out, [*others, staged.entry])
    embed(photos, out=out, model=encoder, tokens=True)
    assert read_part(out / "data/part-00001.parquet")["note"].to_pylist() == ["again"] * len(table)
    assert not check_folder(out).faults


def test_an_unfinished_job_can_be_started_over(tmp_path: Path, photos: Path, encoder: Encoder):
    embed(photos, out=tmp_path / "as", model=encoder, workers=1)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(photos, out=tmp_path / "out", model=encoder, workers=1, max_patches=9, progress=stop)
    assert (tmp_path / "out/_inputs.jsonl.gz").exists()
    embed(photos, out=tmp_path / "out", model=encoder, workers=1, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "as")
