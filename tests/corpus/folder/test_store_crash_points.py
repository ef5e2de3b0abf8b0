"""A job in an object store that dies at any single request, before the store has it or after.

To the store, a job that dies is one that asks for nothing more. The server of the test counts the
requests; from one on it does nothing, so that neither a retry nor tidying up reaches the objects.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from features import contents
from forked_workers import forking, install
from object_store import BUCKET, Server, place, stored
from rotten import encode, pixels, write_good

from packvit.corpus import StoreError
from packvit.corpus.folder import leases, stores
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.folder.resume import find_fault
from packvit.corpus.folder.stores import StorePath
from packvit.corpus.job import embed
from packvit.encoder import Encoder

pytestmark = pytest.mark.soak

INPUTS, ROWS = 9, 4


@pytest.fixture(scope="module", autouse=True)
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    address = tmp_path_factory.mktemp("workers") / "socket"
    with pytest.MonkeyPatch.context() as patch, forking(address):
        install(address, patch)
        yield


@pytest.fixture
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StorePath:
    monkeypatch.setattr(leases, "EXPIRY", 0.0)  # of a job that was killed
    return place(f"s3://{BUCKET}/{request.node.originalname}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_good(folder, INPUTS)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def job(photos: Path, out: str | Path, encoder: Encoder, **options: Any) -> None:
    same: dict[str, Any] = {"rows_per_part": ROWS, "workers": 1, "format": "npy"}
    embed(photos, out=out, model=encoder, **same, **options)


def put(folder: StorePath, objects: dict[str, bytes]) -> None:
    """Put objects in the place of all there are."""
    stores.remove_many([folder / name for name in folder.sizes()])
    for name, data in objects.items():
        (folder / name).write(data)


def raw(folder: StorePath) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in folder.sizes()}


def look(folder: StorePath) -> frozenset[tuple[str, bytes]]:
    """Return all objects, of a lease the name alone: jobs give themselves others each time."""
    objects = raw(folder).items()
    return frozenset((name, b"" if name.startswith("_lease/") else data) for name, data in objects)


def check(folder: StorePath, request: int, lost: str | None = None) -> None:
    """Check that every part that is committed is whole, except one that was lost before."""
    for entry in read_commits(folder):
        assert entry.part == lost or find_fault(folder, entry) is None, request


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("state", ["fresh", "going on", "retrying"])
def test_a_job_that_dies_at_any_request_goes_on_to_the_same_bytes(
    server: Server,
    folder: StorePath,
    tmp_path: Path,
    photos: Path,
    encoder: Encoder,
    state: str,
    late: bool,
):
    local, options = tmp_path / "out", {}
    begun: dict[str, bytes] = {}
    lost = None
    job(photos, local, encoder)
    if state != "fresh":
        put(folder, {})
        job(photos, str(folder), encoder)
        begun = raw(folder)
    if state == "going on":  # a part has no commit, and a commit no part
        lost = "data/part-00002.parquet"
        del begun["_commits/00001.json"], begun[lost]
    if state == "retrying":
        options = {"retry_errors": True}
        (photos / "broken.jpg").write_bytes(encode(pixels(40, 60, 5), "PNG"))
        job(photos, local, encoder, **options)
    expected = {name: data for name, data in contents(local).items() if name != ".lock"}
    put(folder, begun)
    start = len(server.requests)
    job(photos, str(folder), encoder, **options)
    count = len(server.requests) - start
    assert stored(str(folder)) == expected
    died, repeated = 0, set()
    for number in range(count):
        put(folder, begun)
        with server.dying(number, late=late):
            try:
                job(photos, str(folder), encoder, **options)
            except StoreError:
                died += 1
        check(folder, number, lost)
        if (held := look(folder)) in repeated:
            continue  # what the second job does depends on nothing else
        repeated.add(held)
        job(photos, str(folder), encoder, **options)
        assert stored(str(folder)) == expected, number
        assert not check_folder(folder).faults, number
    # What only gives the lease back, or finds nothing, need not succeed.
    assert died >= 0.85 * count
    print(f"{state}: {died} of {count} requests stopped the job")


def test_a_job_that_is_killed_goes_on_to_the_same_bytes(
    server: Server, folder: StorePath, tmp_path: Path, photos: Path, checkpoint: Path
):
    """By SIGKILL, with a process for each of two halves, and a lease that has to expire."""
    command = [sys.executable, "-m", "packvit", "embed", str(photos), "--model", str(checkpoint)]
    command += ["--device", "cpu", "--rows-per-part", str(ROWS), "--gpus", "2", "--workers", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True)
    put(folder, {})

    def killed(method: str, path: str) -> tuple[str, str] | None:
        if path.endswith("_commits/00001.json") and running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
        return None

    with server.answering(killed):
        running = subprocess.Popen([*command, "--out", str(folder)], start_new_session=True)
        assert running.wait() == -signal.SIGKILL
    assert any(name.startswith("_lease/") for name in folder.sizes())
    check(folder, 0)
    again = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    found = contents(tmp_path / "out")
    del found[".lock"]
    assert stored(str(folder)) == found
