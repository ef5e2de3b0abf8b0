"""A job that dies, or is refused, at any single call by which it changes its folder.

strace does it from outside, so that nothing of ours is replaced by something milder. It counts the
calls of each thread on its own, hence a call is known by its name, its file, and its place among
the calls of that name to that file by one thread.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import crash_server
import pytest
from features import contents
from forked_workers import forking
from rotten import write_good

from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.folder.resume import find_fault
from packvit.corpus.job import embed

pytestmark = pytest.mark.soak

INPUTS, ROWS, PARTS = 9, 4, 3
SERVER = Path(crash_server.__file__)
CHANGING = "openat,mkdir,write,pwrite64,fsync,rename,renameat2,ftruncate,unlink,rmdir"
FAULTS = ("signal=KILL", "error=ENOSPC", "error=EIO")
TRACED = re.compile(r"(\d+) +(\w+)\((.*)")

# What a command finds in a folder: the bytes of all files, and the folders there are.
State = frozenset[tuple[str, bytes | None]]


class Point(NamedTuple):
    """A call that changes the folder, as strace can be told to meet it."""

    call: str
    file: str  # below the folder that is watched; "" is that folder itself
    place: int  # among the calls of this name to this file by one thread


class Call(NamedTuple):
    """A call of an undisturbed command below the folder that is watched."""

    point: Point
    to: str  # the second name of a rename
    succeeds: bool


class Bench:
    """A server that runs jobs under strace."""

    def __init__(self, process: subprocess.Popen[str], photos: Path, checkpoint: Path) -> None:
        self.process = process
        self.photos = photos
        self.checkpoint = checkpoint
        self.exchanges = True  # whether two folders can be exchanged in one step
        self.repeated: dict[str, set[State]] = {}  # states in which a command was run again

    def job(self, out: Path, *options: str) -> list[str]:
        """Return the arguments of a job."""
        arguments = ["embed", str(self.photos), "--out", str(out), "--model", str(self.checkpoint)]
        arguments += ["--device", "cpu", "--tokens", "--format", "npy", "--workers", "1"]
        return [*arguments, "--rows-per-part", str(ROWS), *options]

    def run(self, arguments: list[str], errors: Path, *strace: str) -> tuple[int, str]:
        """Return the exit status of a command, and what it said; it runs under `strace`, if any."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(
            json.dumps([arguments, str(errors), self.exchanges, strace]) + "\n"
        )
        self.process.stdin.flush()
        status = self.process.stdout.readline()
        assert status, "the server died"
        return int(status), errors.read_text()

    def trace(self, arguments: list[str], root: Path) -> list[Call]:
        """Return all calls below `root` of a command that nothing disturbs."""
        log = root.parent / "trace"
        traced = ["-o", str(log), "-y", "-s", "0", "-e", f"trace={CHANGING}"]
        status, said = self.run(arguments, root.parent / "said", *traced)
        assert status == 3, said  # many inputs are no images
        counts: Counter[tuple[str, str, str]] = Counter()
        found: list[Call] = []
        for line in log.read_text().splitlines():
            parsed = TRACED.match(line)
            if not parsed or "resumed>" in line:
                continue
            if parsed[2] == "openat" and "O_CREAT" not in line:
                continue  # it reads, or opens the folder for the fsync that follows
            thread, call, rest = parsed.groups()
            paths = re.findall(re.escape(str(root)) + r'(?:/([^">]+))?(?=[">])', rest)
            if paths:
                counts[thread, call, paths[0]] += 1
                point = Point(call, paths[0], counts[thread, call, paths[0]])
                found.append(Call(point, paths[-1], "= -1" not in line))
        return found

    def points(self, arguments: list[str], root: Path) -> list[Point]:
        """Return all points below `root` of a command that nothing disturbs."""
        return list(dict.fromkeys(call.point for call in self.trace(arguments, root)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_good(folder, 3)
    (folder / "broken.jpg").write_bytes(b"no image")
    for number in range(INPUTS - 4):  # rows that take no call to read: under strace, calls are slow
        (folder / f"{'az'[number % 2]}{number}.jpg").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, checkpoint: Path
) -> Iterator[Bench]:
    if not shutil.which("strace"):
        pytest.fail("Crash points need strace, which is not installed: apt-get install strace.")
    first = tmp_path_factory.mktemp("first")
    command = [sys.executable, str(SERVER), str(photos), str(checkpoint), str(first / "out")]
    with (
        forking(first / "workers"),
        subprocess.Popen(
            [*command, str(first / "workers")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process,
    ):
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Bench(process, photos, checkpoint)
        process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]  it is a pipe


def look(root: Path) -> State:
    """Return all that there is below a folder."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    return frozenset((n, p.read_bytes() if p.is_file() else None) for n, p in found.items())


def begin(out: Path, undisturbed: Path | None, state: str) -> None:
    """Make the folder that a job finds: none, two parts of three, or one lost in the middle."""
    shutil.rmtree(out, ignore_errors=True)
    if state == "fresh":
        return
    assert undisturbed
    shutil.copytree(undisturbed, out)
    lost = {"going on": 2, "mending": 1}[state]
    (out / f"data/part-{lost:05d}.parquet").unlink()
    if state == "going on":
        lines = (out / "_commits.jsonl").read_bytes().splitlines(keepends=True)
        (out / "_commits.jsonl").write_bytes(b"".join(lines[:lost]) + lines[lost][:50])
        (out / "_exports/pooled.npy").unlink()


def meet(
    bench: Bench,
    arguments: list[str],
    out: Path,
    expected: Path,
    begin: Callable[[], None],
    fault: str,
    check: Callable[[Point], None],
    root: Path | None = None,
) -> None:
    """Have a command meet a fault at any of its calls below `root`, and then run it again.

    `check` looks at the folder after the fault. What the second run does depends on nothing else:
    it is run once for each state of the folder.
    """
    root = root or out
    repeated = bench.repeated.setdefault(f"{arguments[0]} {arguments[-1]} {bench.exchanges}", set())
    begin()
    points = bench.points(arguments, root)
    assert contents(out) == contents(expected)
    assert {call for call, _, _ in points} >= {"openat", "write", "fsync", "rename"}
    tidied = []
    for point in points:
        begin()
        call, file, place = point
        status, said = bench.run(
            arguments,
            root.parent / "said",
            *("-o", "/dev/null", "-P", str(root / file), "-e", f"trace={call}"),
            *("-e", f"inject={call}:{fault}:when={place}"),
        )
        check(point)
        if fault == "signal=KILL":
            assert status == -9, (point, said)
        elif status == 3:
            tidied.append(point)
        else:
            assert status == 1, (point, said)
            lines = [line for line in said.splitlines() if line]
            assert lines[-1].startswith("Error: "), (point, said)
            assert "Traceback" not in said, (point, said)
        if (state := look(root)) in repeated:
            continue
        status, said = bench.run(arguments, root.parent / "said")
        assert status == 3, (point, said)
        repeated.add(state)
        assert contents(out) == contents(expected), point
        assert root == out or sorted(path.name for path in root.iterdir()) == ["out"], point
        assert not check_folder(out).faults, point
    # The removal of a temporary file, mostly of one that has its name already, need not succeed.
    assert {(call, file[-4:]) for call, file, _ in tidied} <= {("unlink", ".tmp")}, tidied
    print(f"{fault}: {len(points) - len(tidied)} of {len(points)} points stopped the command")


def check_parts(out: Path, state: str, point: Point) -> None:
    """Check that all parts of the log are whole, except one that was lost before."""
    for entry in read_commits(out) if out.exists() else ():
        lost = state == "mending" and entry.part == "data/part-00001.parquet"
        assert lost or find_fault(out, entry) is None, point


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("state", ["fresh", "going on", "mending"])
def test_a_job_that_meets_a_fault_at_any_call_ends_as_if_it_had_not(
    tmp_path: Path, bench: Bench, photos: Path, state: str, fault: str
):
    expected, out = tmp_path / "undisturbed", tmp_path / "out"
    same = {"model": bench.checkpoint, "device": "cpu", "tokens": True, "rows_per_part": ROWS}
    embed(photos, out=expected, format="npy", **same)
    assert len(read_commits(expected)) == PARTS
    ready = partial(begin, out, expected, state)
    meet(bench, bench.job(out), out, expected, ready, fault, partial(check_parts, out, state))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("state", ["fresh", "going on", "mending"])
def test_a_merge_that_meets_a_fault_at_any_call_ends_as_if_it_had_not(
    tmp_path: Path, bench: Bench, photos: Path, state: str, fault: str
):
    expected, out = tmp_path / "undisturbed", tmp_path / "out"
    same = {"model": bench.checkpoint, "device": "cpu", "tokens": True, "rows_per_part": ROWS}
    embed(photos, out=expected, format="npy", **same)
    shards = [str(tmp_path / "1"), str(tmp_path / "2")]
    for number, shard in enumerate(shards, 1):
        embed(photos, out=shard, shard=f"{number}/2", **same)
    arguments = ["merge", *shards, "--out", str(out), "--format", "npy"]
    ready = partial(begin, out, expected, state)
    meet(bench, arguments, out, expected, ready, fault, partial(check_parts, out, state))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_an_update_that_meets_a_fault_at_any_call_leaves_the_old_folder_or_the_new(
    tmp_path: Path, bench: Bench, photos: Path, way: str, fault: str
):
    """Between two renames there is none, until the next command."""
    disk, old, expected = tmp_path / "disk", tmp_path / "old", tmp_path / "undisturbed"
    disk.mkdir()
    earlier = shutil.copytree(photos, tmp_path / "earlier", symlinks=True)
    (earlier / "good-0001.png").rename(earlier / "renamed.png")
    (earlier / "good-0002.webp").unlink()
    same: dict[str, Any] = {"model": bench.checkpoint, "device": "cpu", "tokens": True}
    same |= {"invariant": True, "rows_per_part": ROWS}
    embed(earlier, out=old, format="npy", **same)
    embed(photos, out=expected, format="npy", **same)
    out, bench.exchanges = disk / "out", way == "exchange"

    def begin() -> None:
        for path in disk.iterdir():
            shutil.rmtree(path)
        shutil.copytree(old, out)

    def check(point: Point) -> None:
        if way == "exchange" or out.exists():
            tidied = (".updating", ".known.tmp")  # by the next command
            held = {name: data for name, data in contents(out).items() if name not in tidied}
            assert held in (contents(old), contents(expected)), point
        else:
            assert (disk / ".out.replaced").exists(), point

    arguments = bench.job(out, "--update", "--invariant")
    try:
        meet(bench, arguments, out, expected, begin, fault, check, root=disk)
    finally:
        bench.exchanges = True


def check_flushes(calls: list[Call]) -> None:
    """Check that a power cut loses nothing that a later call builds on.

    Contents are flushed before they take a name; parts and their names before the log, all of a new
    folder before it takes the old one's place, and that before anything of the old is removed.
    """
    contents, names, swapped = set[str](), set[str](), False  # what a power cut may lose
    for (call, file, _), to, succeeds in calls:
        below = {name for name in names if os.path.dirname(name) == file}
        if not succeeds:
            continue
        if call in ("openat", "mkdir"):
            names.add(file)
        elif call in ("write", "pwrite64", "ftruncate"):
            contents.add(file)
            log = file.removesuffix("_commits.jsonl")
            if file != log:
                assert not [name for name in names if name.startswith(f"{log}data")], names
        elif call == "fsync":
            contents.discard(file)
            names -= below
            swapped &= file != ""
        elif call in ("rename", "renameat2"):
            inside = {name for name in contents | names if name.startswith(f"{file}/")}
            assert not inside - {f"{file}/.lock"}, (file, inside)
            assert file not in contents
            names = (names - {file}) | {to}
            swapped |= "/" not in file  # and not a file in a folder
        elif call in ("unlink", "rmdir"):
            assert not swapped, file
            contents.discard(file)
            names.discard(file)
    kept = {name for name in contents | names if os.path.basename(name) != ".lock"}
    assert not kept


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_power_cut_loses_no_part_that_is_logged_and_no_folder_that_is_updated(
    tmp_path: Path, bench: Bench, photos: Path, way: str
):
    disk, earlier = tmp_path / "disk", tmp_path / "earlier"
    shutil.copytree(photos, earlier, symlinks=True)
    (earlier / "good-0001.png").unlink()
    disk.mkdir()
    out, bench.exchanges = disk / "out", way == "exchange"
    before = bench.job(out, "--invariant")
    before[1] = str(earlier)
    calls = bench.trace(before, disk)
    assert sum(call.point.file == "out/_commits.jsonl" for call in calls) >= PARTS
    check_flushes(calls)
    try:
        check_flushes(bench.trace(bench.job(out, "--update", "--invariant"), disk))
    finally:
        bench.exchanges = True


# Runs a job on a disk that is too small for it, then read-only, and then again with room.
DISK = r"""
set -u
disk=$1; shift
mount -t tmpfs -o size=120k tmpfs "$disk"
"$@" --out "$disk/out" > /dev/null 2> "$disk.full"; echo $?
mount -o remount,ro "$disk"
"$@" --out "$disk/out" > /dev/null 2> "$disk.read-only"; echo $?
mount -o remount,rw,size=50m "$disk"
"$@" --out "$disk/out" > /dev/null 2> "$disk.room"; echo $?
cp -r "$disk/out" "$disk.out"
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_full_and_a_read_only_disk_cost_one_sentence_and_nothing_that_is_whole(
    tmp_path: Path, checkpoint: Path, processes: str
):
    write_good(tmp_path / "photos", 130)
    embed(tmp_path / "photos", out=tmp_path / "as", model=checkpoint, device="cpu", tokens=True)
    job = [sys.executable, "-m", "packvit", "embed", str(tmp_path / "photos"), "--gpus", processes]
    job += ["--model", str(checkpoint), "--device", "cpu", "--tokens"]
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        # Mounts are allowed in a namespace of one's own, to anyone.
        ["unshare", "-rm", "bash", "-c", DISK, "disk", str(disk), *job],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "1", "0"], done.stderr
    for state, reason in (("full", "No space left on device"), ("read-only", "Read-only file")):
        said = (tmp_path / f"disk.{state}").read_text()
        last = said.splitlines()[-1]
        assert last.startswith("Error: "), said
        assert f"could not be written: {reason}" in last, said
        assert "Traceback" not in said
    assert contents(tmp_path / "disk.out") == contents(tmp_path / "as")
