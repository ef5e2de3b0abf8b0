"""Shards embedded in other processes end as the bytes that one process writes, whatever dies."""

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from features import contents
from object_store import BUCKET, serving
from rotten import write_good
from safetensors.torch import load_file, save_file
from small_checkpoint import write_checkpoint

import packvit
from packvit.checkpoints.errors import CheckpointError
from packvit.corpus import EmbedderError, UsageError
from packvit.corpus.encode.filling import Shard
from packvit.corpus.folder.layout import enter, read_commits
from packvit.corpus.folder.ownership import left_over
from packvit.corpus.folder.stores import find_folder
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.job import embed
from packvit.corpus.manifest import describe_job
from packvit.corpus.progress import Effort, Progress, Shares
from packvit.corpus.runners.actor import ShardActor
from packvit.corpus.runners.cluster import connect, spool
from packvit.corpus.runners.embedder import Finished, Job, load_alike
from packvit.corpus.runners.host import Loading, Pool
from packvit.corpus.runners.launching import Launched, Started, start
from packvit.corpus.runners.order import Sequencer, Work
from packvit.corpus.settings import EmbedOptions, ModelChoice, choose_rows, fit_options
from packvit.encoder import Encoder

INPUTS, PARTS = 640, 10  # 64 inputs a part, since tokens are written
DEADLINE = 60.0  # seconds in which anything here happens, or never


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    names = write_good(folder, 7)
    for number in range(INPUTS - 8):
        os.link(folder / names[number % 7], folder / f"{number:03}.jpg")
    (folder / "300a.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, checkpoint: Path
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = embed(photos, out=out, model=checkpoint, device="cpu", tokens=True)
    assert (done.rows, done.errors) == (INPUTS, {"unidentified": 1})
    assert len(read_commits(out)) == PARTS
    return contents(out)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = [int(child) for child in (thread / "children").read_text().split()]
        except FileNotFoundError:  # it ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def ours() -> list[int]:
    """Return this process's descendants that run packvit: other tests may have left helpers."""
    return [child for child in descendants(os.getpid()) if "packvit" in title(child)]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def embedders(pid: int) -> list[int]:
    """Return the processes that embed for a job, without their decode workers."""
    return [child for child in descendants(pid) if "runners.host" in title(child)]


def await_that(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def killer(workers: Callable[[], list[int]], kills: int) -> Callable[[Progress], None]:
    """Return a watch that kills the first worker, so many times, once a part is committed."""
    killed: list[int] = []

    def tell(progress: Progress) -> None:
        if progress.committed and len(killed) < kills:
            alive = [pid for pid in workers() if pid not in killed]
            if alive:
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])

    return tell


def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    told: list[Progress] = []
    out = tmp_path / "out"
    summary = embed(
        photos,
        out=out,
        model=checkpoint,
        device="cpu",
        tokens=True,
        processes=2,
        progress=told.append,
    )
    assert contents(out) == undisturbed
    assert ours() == []
    assert (summary.rows, summary.ok) == (INPUTS, INPUTS - 1)
    assert [progress.committed for progress in told] == sorted(p.committed for p in told)
    last = replace(told[-1], shares=Shares())
    assert last == Progress(INPUTS, INPUTS, 1, summary.tokens, INPUTS)
    shares = summary.shares  # what was spent in other processes is known here
    assert 0 < shares.encoding < 1
    assert 0 < shares.decoding < 1
    assert 0 < shares.writing < 1
    assert 0 < shares.fill <= 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_job_goes_to_all_processes_though_one_is_ready_first(count: int):
    ends = [Pipe() for _ in range(3)]
    started = []
    for ours, _ in ends:
        with subprocess.Popen(["true"]) as process:
            started.append(Started(process, ours))
    pool = Pool(started)
    first, *others = pool.embedders.values()
    source, order = (Shard(number, ()) for number in range(count)), Sequencer()
    pool.unsent = count
    first.ready = True
    pool.hand_out(source, order)
    assert len(first.shards) == (2 if count > 3 else 1)  # a second only if three are left
    for other in others:
        other.ready = True
    pool.hand_out(source, order)
    assert all(embedder.shards for embedder in list(pool.embedders.values())[:count])
    assert sum(len(embedder.shards) for embedder in pool.embedders.values()) == count


@pytest.mark.soak
def test_a_killed_process_is_replaced_and_nothing_is_lost(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    out = tmp_path / "out"
    kill = killer(lambda: embedders(os.getpid()), kills=1)
    embed(photos, out=out, model=checkpoint, device="cpu", tokens=True, processes=2, progress=kill)
    assert contents(out) == undisturbed
    assert ours() == []


@pytest.mark.soak
def test_what_is_missing_in_the_middle_is_embedded_by_processes_and_entered_in_its_place(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    (tmp_path / "data").mkdir()
    for name, data in undisturbed.items():
        (tmp_path / name).write_bytes(data)
    for number in (2, 3, 9):
        (tmp_path / f"data/part-{number:05d}.parquet").unlink()
    summary = embed(photos, out=tmp_path, model=checkpoint, device="cpu", tokens=True, processes=3)
    assert summary.kept_rows == INPUTS - 3 * 64
    assert contents(tmp_path) == undisturbed


@contextmanager
def killing(workers: Callable[[], list[int]]) -> Iterator[None]:
    """Kill every worker as soon as it is there."""
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.002):
            for pid in workers():
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_processes_that_die_again_and_again_end_the_job_with_a_sentence(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    with (
        killing(lambda: embedders(os.getpid())),
        pytest.raises(EmbedderError, match=r"loaded the model died 3 times, .* exit status -9"),
    ):
        embed(photos, out=tmp_path, model=checkpoint, device="cpu", tokens=True, processes=2)
    assert contents(tmp_path) == {}
    assert ours() == []


def test_a_checkpoint_that_processes_refuse_is_refused_once_and_nothing_is_written(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = load_file(damaged / "model.safetensors")
    last = max(weights)
    weights[last] = torch.full_like(weights[last], float("nan"))
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"^{last} in .* are NaN or infinite"):
        embed(photos, out=out, model=damaged, device="cpu", processes=2)
    assert not out.exists()
    assert ours() == []


def test_processes_started_ahead_end_with_a_command_that_does_not_use_them():
    launched = Launched(2)
    started = [each.process for each in launched.started]
    with suppress(UsageError), launched:
        assert all(process.poll() is None for process in started)
        raise UsageError("no such option")
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_process_ends_with_a_parent_that_died_in_the_middle_of_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "torch.py").write_text("open('imported', 'w')")  # of the user, and not for us
    monkeypatch.chdir(tmp_path)
    started = start()
    os.write(started.connection.fileno(), struct.pack("!i", 1000) + b"half of it")
    started.connection.close()
    try:
        assert started.process.wait(DEADLINE) == 0
    finally:
        started.process.kill()
    assert not (tmp_path / "imported").exists()


def test_a_process_that_died_in_the_middle_of_a_message_is_replaced():
    connection, its = Pipe()
    os.write(its.fileno(), struct.pack("!i", 1000) + b"half of it")
    its.close()
    pool = Pool([Started(subprocess.Popen(["false"]), connection)])
    try:
        pool.loadings.append(Loading(ModelChoice(), EmbedOptions(), 1))
        pool.await_messages(Sequencer())
        assert [each.process.poll() for each in pool.embedders.values()] == [None]
    finally:
        pool.close()


def test_more_processes_than_the_system_starts_are_refused_and_none_is_left():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptor = os.dup(0)  # the lowest that is free
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 7, limits[1]))  # enough for one
    try:
        with pytest.raises(EmbedderError, match=r"started: Too many open files\. Ask for fewer"):
            Launched(9)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ours() == []


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_no_process_is_left_with_much_more_than_its_share_of_a_job(processes: int):
    for inputs in (2_000, 4_000, 8_000, 16_000, 24_000, 100_000):
        rows = choose_rows(torch.device("cuda"), inputs, large=False)
        done, parts = [0] * processes, [rows] * (inputs // rows) + [inputs % rows]
        for part in parts:  # each goes to the first that is idle, and all are equally quick
            done[done.index(min(done))] += part
        assert max(done) <= 1.15 * inputs / processes


def start_job(photos: Path, out: Path, checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    """Start a job in a session of its own."""
    command = [sys.executable, "-m", "packvit", "embed", str(photos), "--out", str(out)]
    command += ["--model", str(checkpoint), "--device", "cpu", "--tokens", *options]
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def stop_and_resume(
    photos: Path, out: Path, checkpoint: Path, stop: Callable[[int], None]
) -> tuple[int, str]:
    """Stop a job of two processes once a part is committed, and let one process go on."""
    job = start_job(photos, out, checkpoint, "--gpus", "2")
    await_that(lambda: bool(read_commits(out)))
    workers = descendants(job.pid)
    stop(job.pid)
    _, said = job.communicate(timeout=DEADLINE)
    await_that(lambda: not any(title(pid) for pid in workers))
    assert len(read_commits(out)) < PARTS, "the job ended before it was stopped"
    embed(photos, out=out, model=checkpoint, device="cpu", tokens=True)
    return job.returncode, said


@pytest.mark.soak
def test_ctrl_c_reaches_all_processes_and_the_job_stops_cleanly(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    code, said = stop_and_resume(
        photos, tmp_path, checkpoint, lambda pid: os.killpg(pid, signal.SIGINT)
    )
    assert code == 130
    assert "rows are written" in said
    assert "Traceback" not in said
    assert contents(tmp_path) == undisturbed


@pytest.mark.soak
def test_sigterm_stops_the_job_cleanly(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    code, said = stop_and_resume(
        photos, tmp_path, checkpoint, lambda pid: os.kill(pid, signal.SIGTERM)
    )
    assert (code, "Traceback" in said) == (143, False)
    assert contents(tmp_path) == undisturbed


@pytest.mark.soak
def test_workers_do_not_outlive_a_killed_job(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    code, _ = stop_and_resume(
        photos, tmp_path, checkpoint, lambda pid: os.kill(pid, signal.SIGKILL)
    )
    assert code == -signal.SIGKILL
    assert contents(tmp_path) == undisturbed


@pytest.mark.soak
def test_a_disk_that_is_full_for_a_worker_ends_the_job_with_a_sentence(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    size = max(len(data) for data in undisturbed.values()) // 2  # no part fits
    command = ["prlimit", f"--fsize={size}", sys.executable, "-m", "packvit", "embed", str(photos)]
    command += ["--out", str(tmp_path), "--model", str(checkpoint), "--device", "cpu", "--tokens"]
    done = subprocess.run([*command, "--gpus", "2"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be written: File too large. Fix that" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(contents(tmp_path)) == {".lock", "_inputs.jsonl.gz", "_manifest.json"}


def test_a_worker_that_would_write_other_numbers_refuses_and_says_what_differs(
    tmp_path: Path, checkpoint: Path
):
    encoder = packvit.load(checkpoint, device="cpu")
    options = EmbedOptions(resize="native", max_patches=1024)
    assert encoder.checkpoint
    job = Job(
        folder="out",
        options=options,
        described=describe_job(encoder, encoder.checkpoint.sha256(), options),
        positions="checkpoint",
        model=str(checkpoint),
    )
    assert isinstance(load_alike(job, "cpu"), Encoder)
    other = replace(job, model=str(write_checkpoint(tmp_path / "other", scale=2.0)))
    with pytest.raises(EmbedderError, match=r"other numbers than this job.*\n  weights_sha256: "):
        load_alike(other, "cpu")


def test_what_other_processes_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    encoder = packvit.load(checkpoint, device="cpu")
    with pytest.raises(UsageError, match="only this process can use"):
        embed(photos, out=tmp_path / "out", model=encoder, processes=2)
    with pytest.raises(UsageError, match="only this process can use"):
        embed(photos, out=tmp_path / "out", model=encoder, ray="local")
    with pytest.raises(UsageError, match="processes is 0, but must be 1 or more"):
        embed(photos, out=tmp_path / "out", model=checkpoint, processes=0)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_line_that_installs_it_is_shown(
    tmp_path: Path, photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'Ray is needed: pip install "packvit\[ray\]"'):
        embed(photos, out=tmp_path / "out", model=checkpoint, device="cpu", ray="local")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("installed_by_python", [True, False])
def test_without_a_cluster_sigterm_still_has_the_handler_of_before(
    monkeypatch: pytest.MonkeyPatch, installed_by_python: bool
):
    def init(*args: object, **options: object) -> None:  # as Ray does, before it fails
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError("no cluster")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    if not installed_by_python:
        monkeypatch.setattr(signal, "getsignal", lambda number: None)
    try:
        with pytest.raises(UsageError, match="There is no Ray cluster"):
            connect("local")
        monkeypatch.undo()
        assert not installed_by_python or signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.soak
def test_actors_on_ray_write_the_bytes_of_one_process_though_one_is_killed(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes]
):
    out = tmp_path / "out"
    job = start_job(photos, out, checkpoint, "--ray", "local", "--gpus", "2")

    def actors() -> list[int]:
        return [pid for pid in descendants(job.pid) if title(pid).startswith("ray::MapWorker")]

    await_that(lambda: bool(read_commits(out)) or job.poll() is not None)
    first = actors()
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    committed = len(read_commits(out))
    _, said = job.communicate(timeout=2 * DEADLINE)
    assert job.returncode == 3, said  # one input is no image
    assert committed < PARTS, "the job ended before an actor was killed"
    assert contents(out) == undisturbed


def test_an_actor_whose_node_does_not_share_the_folders_says_so(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    options = EmbedOptions(workers=1)
    encoder = packvit.load(checkpoint, device="cpu")
    assert encoder.checkpoint
    described = describe_job(encoder, encoder.checkpoint.sha256(), options)
    job = Job(str(tmp_path / "elsewhere"), options, described, "checkpoint", str(checkpoint))
    for working in (tmp_path / "nowhere", tmp_path):
        monkeypatch.chdir(tmp_path)  # where it was is restored
        actor = ShardActor(job, str(working))
        for call in [actor.submit(0, 1), actor.submit(1, 1)]:
            found = call.result(DEADLINE)
            assert isinstance(found, EmbedderError)
            assert "No such file or directory. All nodes of the cluster need" in str(found)
        if actor.context:
            actor.context.decoders.workers.end()


@pytest.mark.parametrize("store", [False, True], ids=["on a disk", "in a store"])
def test_an_actor_stages_the_parts_of_all_its_calls_and_leaves_no_attempt(
    tmp_path: Path, photos: Path, checkpoint: Path, undisturbed: dict[str, bytes], store: bool
):
    encoder = packvit.load(checkpoint, device="cpu")
    assert encoder.checkpoint
    options = fit_options(encoder, EmbedOptions(workers=1, tokens=True))
    described = describe_job(encoder, encoder.checkpoint.sha256(), options)
    inputs = list(list_inputs([str(photos)]))
    shards = [Shard(number, tuple(inputs[number * 64 :][:64])) for number in range(3)]
    with serving() if store else nullcontext():
        out = find_folder(f"s3://{BUCKET}/out" if store else str(tmp_path))
        work = Work(shards, len(shards), out, -1, lambda rows: None, Effort())
        _, places = spool(work)
        job = Job(str(out), options, described, "checkpoint", str(checkpoint))
        actor = ShardActor(job, str(tmp_path))
        calls = [actor.submit(each["start"], each["bytes"]) for each in places]
        for number, call in enumerate(calls):
            finished = call.result(DEADLINE)
            assert isinstance(finished, Finished), finished
            name = enter(out, finished.staged).part
            assert (finished.number, name) == (number, f"data/part-{number:05d}.parquet")
            assert (out / name).read_bytes() == undisturbed[name]
        assert [each for each in left_over(out) if "part" in each] == []
        assert actor.context
        actor.context.decoders.workers.end()


@pytest.mark.soak
def test_a_part_that_kills_its_actors_ends_the_job_with_a_sentence(
    tmp_path: Path, photos: Path, checkpoint: Path
):
    out = tmp_path / "out"
    job = start_job(photos, out, checkpoint, "--ray", "local", "--gpus", "1")

    attempts: set[str] = set()

    def embedding() -> list[int]:  # the actors, once for every attempt at a part
        begun = {path.name for path in out.glob(".part-*.tmp")} if out.exists() else set()
        if begun <= attempts:
            return []
        attempts.update(begun)
        return [pid for pid in descendants(job.pid) if title(pid).startswith("ray::MapWorker")]

    with killing(embedding):
        _, said = job.communicate(timeout=3 * DEADLINE)
    assert job.returncode == 1
    assert "died 3 times" in said
    assert "Traceback" not in said
    assert not [name for name in contents(out) if name.startswith(".part")]


@pytest.mark.soak
def test_where_there_is_no_cluster_it_is_said(tmp_path: Path, photos: Path, checkpoint: Path):
    job = start_job(photos, tmp_path / "out", checkpoint, "--ray", "127.0.0.1:1")
    _, said = job.communicate(timeout=2 * DEADLINE)
    assert job.returncode == 2, said
    assert 'There is no Ray cluster at "127.0.0.1:1"' in said
