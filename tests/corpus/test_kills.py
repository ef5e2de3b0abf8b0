"""Acceptance of issue 16: kills of a job and of its workers at any age cost the workers' images."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from features import contents
from rotten import encode, pixels

from packvit.corpus.folder.checking import check_folder

pytestmark = pytest.mark.soak

INPUTS = 200
KILLS_OF_JOBS, KILLS_OF_WORKERS = 25, 30
EARLY = 12  # of each, within the first second


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 1.5 MP, so that most workers are killed in the middle of one."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        data = encode(pixels(1000 + number, 1500, number), "JPEG", quality=85)
        (folder / f"{number:03}.jpg").write_bytes(data)
    for number in range(8, INPUTS):
        os.link(folder / f"{number % 8:03}.jpg", folder / f"{number:03}.jpg")
    return folder


def start(photos: Path, checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a job that embeds the photos."""
    argv = [sys.executable, "-m", "packvit", "embed", photos, "--model", checkpoint, "--out", out]
    options = ["--device", "cpu", "--workers", "2", "--max-patches", "16", "--json"]
    with said_by(out).open("ab") as said:
        return subprocess.Popen(
            [*argv, *options],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def said_by(out: Path) -> Path:
    """Return the file with what the jobs of a folder wrote to stderr."""
    return out.with_name(f"{out.name}.stderr")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, checkpoint: Path
) -> tuple[Path, float]:
    """The folder of a job that nothing befell, and the seconds it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    before = time.monotonic()
    assert start(photos, checkpoint, out).wait() == 0, said_by(out).read_text()
    return out, time.monotonic() - before


def workers(job: int) -> Iterator[tuple[int, float]]:
    """Yield the workers of a job and their ages in seconds."""
    now, ticks = time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            facts = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(facts[1]) == job and b"packvit.corpus.decode.worker" in command:
            yield int(name), now - int(facts[19]) / ticks


def test_jobs_that_are_killed_at_any_age_end_as_an_undisturbed_one(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: tuple[Path, float]
):
    expected, seconds = undisturbed
    draw, folders, ages = random.Random(16), 1, []
    while len(ages) < KILLS_OF_JOBS:
        age = draw.random() if len(ages) < EARLY else draw.uniform(1.0, seconds)
        job = start(photos, checkpoint, tmp_path / str(folders))
        try:
            assert job.wait(age) == 0, said_by(tmp_path / str(folders)).read_text()
            folders += 1  # it came to its end
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            ages.append(age)
    for number in range(1, folders + 1):
        out = tmp_path / str(number)
        assert start(photos, checkpoint, out).wait() == 0, said_by(out).read_text()
        assert contents(out) == contents(expected)
    print(f"{len(ages)} kills of jobs, {sum(age < 1 for age in ages)} early, {folders} folders")


def kill_workers(job: subprocess.Popen[bytes], ages: list[float]) -> int:
    """Kill workers of a job, each as it comes to the next of these ages; return how many."""
    killed = 0
    while ages and job.poll() is None:
        for pid, age in workers(job.pid):
            # One that is older than a second is too old for an early kill.
            if ages and age >= ages[0] and (age < 1.0 or ages[0] >= 1.0):
                os.kill(pid, signal.SIGKILL)
                ages.pop(0)
                killed += 1
        time.sleep(0.01)
    return killed


def test_workers_that_are_killed_at_any_age_cost_their_images_and_no_others(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: tuple[Path, float]
):
    expected, _ = undisturbed
    draw, folders, lost = random.Random(17), 0, 0
    early = [draw.random() for _ in range(EARLY)]
    late = [draw.uniform(1.0, 2.5) for _ in range(KILLS_OF_WORKERS - EARLY)]
    ages = early + late
    draw.shuffle(ages)
    while ages:
        folders += 1
        out = tmp_path / str(folders)
        job = start(photos, checkpoint, out)
        killed = kill_workers(job, ages)
        assert job.wait() in (0, 3), said_by(out).read_text()
        assert not check_folder(out).faults
        crashes = 0
        for part in sorted((expected / "data").iterdir()):
            theirs = pq.read_table(part).to_pylist()
            ours = pq.read_table(out / "data" / part.name).to_pylist()
            bad = sum(row["status"] != "ok" for row in ours)
            crashes += bad
            if not bad:
                assert (out / "data" / part.name).read_bytes() == part.read_bytes()
            assert [row["id"] for row in ours] == [row["id"] for row in theirs]
            for row, right in zip(ours, theirs, strict=True):
                if row["status"] != "ok":
                    assert row["status"] == "decoder_crash"
                    continue
                assert row["sha256"] == right["sha256"]
                # Packs of other sizes round otherwise, in the last bits.
                np.testing.assert_allclose(row["pooled"], right["pooled"], rtol=1e-4, atol=1e-5)
        assert crashes <= killed
        lost += crashes
    assert lost
    print(f"{KILLS_OF_WORKERS} kills of workers, {EARLY} early, {folders} folders, {lost} rows")
