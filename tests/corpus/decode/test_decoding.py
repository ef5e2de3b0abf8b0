"""Decode workers are real processes here, and what befalls them is done to them from outside."""

import bz2
import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rotten import encode, exif, pixels, png, write_good, write_rotten

import packvit
from packvit.config import ImageConfig
from packvit.corpus import DecoderError
from packvit.corpus.decode.prepare import Preprocessing, prepare
from packvit.corpus.decode.processes import Worker
from packvit.corpus.decode.queue import TOGETHER, DecodeQueue, Decoders, Stopped
from packvit.corpus.decode.worker import MOST_BYTES
from packvit.corpus.folder.checking import check_folder
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Input
from packvit.encoder import Encoder

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageConfig(patch=14, mean=HALF, std=HALF, resample="bicubic", sizing=None)
PREPROCESSING = Preprocessing(IMAGES, "hwc", "native", 256, 100_000_000)
AHEAD = 10_000_000


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.await_ready()
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A PNG that takes about a second and 350 MB."""
    return encode(Image.new("1", (9400, 9400)), "PNG")


def memory(pid: int, name: str = "VmRSS") -> int:
    """Return bytes that a process holds now, or (VmHWM) ever held."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
    except (OSError, StopIteration):  # it has ended
        return 0


def tasks(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    """Return the decode workers among the processes that `pid` started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            if (
                parent == pid
                and b"packvit.corpus.decode.worker" in Path(f"/proc/{name}/cmdline").read_bytes()
            ):
                found.append(int(name))
        except OSError:  # it has ended
            pass
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def at_once(count: int) -> None:
    """Admit whatever asks."""


class Modules(Input):
    """Arrives in a worker as an input whose name is the list of modules there."""

    def __reduce__(self):
        modules = "','.join(sorted(__import__('sys').modules))"
        inputs = "__import__('packvit.corpus.inputs.sources', fromlist=['Input'])"
        return eval, (f"{inputs}.Input({modules}, '/nowhere')",)


def test_a_worker_never_imports_torch(worker: Worker):
    [prepared], _ = worker.prepare([Modules("", "")], PREPROCESSING, at_once, 60.0)
    modules = prepared.row.id.split(",")
    assert "PIL.Image" in modules
    assert not {"torch", "pyarrow", "jaxtyping", "multiprocessing"} & set(modules)
    assert memory(worker.process.pid) < 60_000_000


class Deadly(Input):
    """Kills the worker that is told of it."""

    def __reduce__(self):
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


class Slow(Input):
    """Takes a fifth of a second to be found missing, as behind a slow server."""

    def __reduce__(self):
        wait = "(__import__('time').sleep(0.2), ('missing', 'read'))[1]"
        parts = f"id={self.id!r}, path='', within=None, error=property(lambda self: {wait})"
        return eval, (f"type('Slow', (), dict({parts}))()",)


def write_jpegs(folder: Path, count: int) -> list[str]:
    names = [f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encode(pixels(40 + number, 60, seed=number), "JPEG"))
    return names


def test_jpegs_for_the_device_come_together_until_something_else_stands_between(
    tmp_path: Path, worker: Worker
):
    names = write_jpegs(tmp_path, 5)
    (tmp_path / "other.png").write_bytes(encode(pixels(40, 60), "PNG"))
    names = [*names[:3], "missing.jpg", "other.png", *names[3:]]
    inputs = [Input(name, str(tmp_path / name)) for name in names]
    preprocessing = replace(PREPROCESSING, decode="gpu")
    asked, took = [], []
    while len(took) < len(inputs):
        prepared, _ = worker.prepare(inputs[len(took) :], preprocessing, asked.append, 60.0)
        took += [(image.row.id, image.row.status, image.jpeg is not None) for image in prepared]
        assert [row for row, _, _ in took] == names[: len(took)]
        if len(took) == 4:  # errors need no admission; the PNG was left for a task of its own
            assert not asked
    assert asked == [40 * 60]
    assert [on_device for _, _, on_device in took] == [True] * 3 + [False] * 2 + [True] * 2
    assert [status for _, status, _ in took] == ["ok"] * 3 + ["missing"] + ["ok"] * 3


def test_a_task_ends_with_so_many_bytes_of_files(tmp_path: Path, worker: Worker):
    data = encode(noise(), "JPEG", quality=60)
    assert MOST_BYTES / 2 < len(data) < MOST_BYTES
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    inputs = list(list_inputs([str(tmp_path)]))
    prepared, _ = worker.prepare(inputs, replace(PREPROCESSING, decode="gpu"), at_once, 60.0)
    assert len(prepared) == 2


def test_an_image_that_was_admitted_is_blamed_for_nothing_that_comes_behind_it(
    tmp_path: Path, worker: Worker
):
    (tmp_path / "cut.png").write_bytes(encode(pixels(200, 200), "PNG")[:-500])
    inputs = [Input("cut.png", str(tmp_path / "cut.png")), Slow("slow", "/nowhere")]
    prepared, _ = worker.prepare(inputs, replace(PREPROCESSING, decode="gpu"), at_once, 60.0)
    assert [(image.row.id, image.row.status) for image in prepared] == [("cut.png", "truncated")]


def test_a_worker_that_takes_long_comes_back_with_what_it_has(worker: Worker):
    inputs = [Slow(str(number), "/nowhere") for number in range(6)]
    prepared, _ = worker.prepare(inputs, replace(PREPROCESSING, decode="gpu"), at_once, 60.0)
    assert [(image.row.id, image.row.status) for image in prepared] == [("0", "missing")]


def test_of_images_that_are_asked_for_together_one_kills_its_worker_and_no_other_is_lost(
    tmp_path: Path,
):
    names = write_jpegs(tmp_path, 40)
    inputs = [Input(name, str(tmp_path / name)) for name in names]
    inputs[7:7] = [Deadly("deadly", "/nowhere")]
    with Decoders(2) as decoders:
        done = list(decoders.prepare_all(inputs, replace(PREPROCESSING, decode="gpu"), AHEAD))
    rows = [image.row for image in done]
    assert [row.id for row in rows] == [source.id for source in inputs]
    assert [row.id for row in rows if row.status != "ok"] == ["deadly"]
    assert (rows[7].status, rows[7].stage) == ("decoder_crash", "header")


def noise() -> Image.Image:
    """An image of 5 MP that nothing compresses."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2500, 3), np.uint8))


def clear(image: Image.Image) -> Image.Image:
    """Return a transparent copy."""
    copy = image.copy()
    copy.putalpha(Image.linear_gradient("L").resize(image.size))
    return copy


def check_memory(worker: Worker, path: Path, bytes_a_pixel: int, more: int = 0) -> None:
    """Let a worker decode an image of 5 MP, and see what it ever held."""
    [prepared], _ = worker.prepare([Input("", str(path))], PREPROCESSING, at_once, 60.0)
    assert prepared.row.status == "ok"
    peak = memory(worker.process.pid, "VmHWM")
    assert peak < 64e6 + bytes_a_pixel * 2000 * 2500 + more, (path.name, peak)


@pytest.mark.soak
def test_a_worker_holds_8_bytes_a_pixel_of_its_largest_image_beside_64_mb(
    tmp_path: Path, worker: Worker
):
    photo, turned = noise(), exif(6)
    wide = np.asarray(photo).astype(">u2").reshape(2000, -1).view(np.uint8)
    files = {
        "a.jpg": encode(photo, "JPEG", quality=95),
        "b.jpg": encode(photo, "JPEG", quality=95, progressive=True, exif=turned),
        "c.png": encode(photo, "PNG", compress_level=0),
        "d.png": encode(clear(photo), "PNG", compress_level=0, exif=turned),
        "e.jpg": encode(photo.convert("CMYK"), "JPEG", exif=turned),
        "f.png": encode(Image.fromarray(np.asarray(photo)[..., 0].astype(np.uint16)), "PNG"),
        "g.png": png(2500, 2000, 16, 2, np.pad(wide, ((0, 0), (1, 0))).tobytes()),
        "h.tif": encode(photo.convert("CMYK"), "TIFF"),
        "i.bmp": encode(photo, "BMP"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        check_memory(worker, tmp_path / name, 8)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "options", "bytes_a_pixel", "copies"),
    [
        ("GIF", {}, 8, 0),
        ("TIFF", {"compression": "tiff_lzw", "transparent": True}, 8, 0),
        ("AVIF", {"speed": 10}, 10, 0),
        ("AVIF", {"speed": 10, "subsampling": "4:4:4", "transparent": True}, 15, 0),
        ("WEBP", {"method": 0}, 16, 2),
        ("WEBP", {"method": 0, "transparent": True, "exif": exif(6)}, 16, 2),
        ("WEBP", {"method": 0, "quality": 0, "lossless": True}, 16, 2),
    ],
)
def test_what_a_worker_holds_for_other_formats(
    tmp_path: Path,
    worker: Worker,
    kind: str,
    options: dict[str, Any],
    bytes_a_pixel: int,
    copies: int,
):
    options = dict(options)
    photo = clear(noise()) if options.pop("transparent", False) else noise()
    data = encode(photo.convert("P") if kind == "GIF" else photo, kind, **options)
    (tmp_path / "a").write_bytes(data)
    check_memory(worker, tmp_path / "a", bytes_a_pixel, copies * len(data))


def test_each_of_eight_workers_decodes_on_one_thread(tmp_path: Path):
    (tmp_path / "0.avif").write_bytes(encode(pixels(600, 800), "AVIF", speed=10))
    for number in range(1, 16):
        os.link(tmp_path / "0.avif", tmp_path / f"{number}.avif")
    over = Event()
    with Decoders(8) as decoders:
        decoders.start(16)
        most = {worker.process.pid: 0 for worker in decoders.workers.idle}

        def watch() -> None:
            while not over.wait(0.005):
                for pid in most:
                    most[pid] = max(most[pid], tasks(pid))

        watching = Thread(target=watch)
        watching.start()
        inputs = list(list_inputs([str(tmp_path)]))
        done = list(decoders.prepare_all(inputs, PREPROCESSING, AHEAD))
        over.set()
        watching.join()
    assert [image.row.status for image in done] == ["ok"] * 16
    assert list(most.values()) == [1] * 8


def test_images_come_in_order_and_as_they_would_without_workers(tmp_path: Path):
    write_rotten(tmp_path)
    write_good(tmp_path, 20)
    inputs = list(list_inputs([str(tmp_path)]))
    with Decoders(3, pixels_in_flight=5_000) as decoders:
        for _ in range(2):  # the same workers serve again
            done = list(decoders.prepare_all(inputs, PREPROCESSING, AHEAD))
            expected = [prepare(source, PREPROCESSING, at_once) for source in inputs]
            assert [image.row for image in done] == [image.row for image in expected]
            for found, right in zip(done, expected, strict=True):
                assert (found.patches is None) == (right.patches is None)
                if found.patches is not None and right.patches is not None:
                    assert np.array_equal(found.patches, right.patches)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, "decoder_crash"), (signal.SIGSTOP, "timeout")]
)
def test_a_worker_that_dies_or_hangs_costs_one_image_and_the_job_goes_on(
    tmp_path: Path, encoder: Encoder, large: bytes, number: signal.Signals, code: str
):
    write_good(tmp_path / "photos", 12)
    (tmp_path / "photos" / "good-0005a.png").write_bytes(large)
    struck: list[int] = []

    def strike() -> None:
        while not struck:
            for pid in children(os.getpid()):
                if memory(pid) > 150_000_000:  # half of the image
                    os.kill(pid, number)
                    struck.append(pid)
            time.sleep(0.005)

    striking = Thread(target=strike)
    striking.start()
    summary = packvit.embed(
        tmp_path / "photos", out=tmp_path / "out", model=encoder, workers=2, image_timeout=4.0
    )
    striking.join()
    assert (summary.ok, summary.errors) == (12, {code: 1})
    rows = pq.read_table(tmp_path / "out" / "data/part-00000.parquet").to_pylist()
    (bad,) = (row for row in rows if row["status"] != "ok")
    assert (bad["id"], bad["stage"]) == ("good-0005a.png", "decode")
    assert bad["note"] == ("over 4 s" if code == "timeout" else None)
    assert not check_folder(tmp_path / "out").faults
    wait_for(lambda: not memory(struck[0]))
    assert not children(os.getpid())


def test_an_image_that_memory_has_no_room_for_is_a_row_and_its_worker_goes_on(
    tmp_path: Path, large: bytes, worker: Worker
):
    (good,) = write_good(tmp_path, 1)
    (tmp_path / "large.png").write_bytes(large)
    with open(f"/proc/{worker.process.pid}/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + 250_000_000
    resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (limit, limit))
    found = [
        worker.prepare([Input(name, str(tmp_path / name))], PREPROCESSING, at_once, 60.0)[0][0].row
        for name in ("large.png", good)
    ]
    assert [(row.status, row.stage) for row in found] == [("out_of_memory", "decode"), ("ok", None)]


def test_a_worker_that_is_killed_while_idle_costs_no_image(tmp_path: Path):
    write_good(tmp_path, 3)
    inputs = list(list_inputs([str(tmp_path)]))
    with Decoders(1) as decoders:
        list(decoders.prepare_all(inputs, PREPROCESSING, AHEAD))
        (pid,) = children(os.getpid())
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        done = list(decoders.prepare_all(inputs, PREPROCESSING, AHEAD))
    assert [image.row.status for image in done] == ["ok"] * 3


def test_workers_heed_no_signal_that_asks_the_job_to_end(tmp_path: Path, worker: Worker):
    (good,) = write_good(tmp_path, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.process.pid, number)
    [prepared], _ = worker.prepare(
        [Input(good, str(tmp_path / good))], PREPROCESSING, at_once, 60.0
    )
    assert prepared.row.status == "ok"


def test_no_worker_outlives_a_job_that_is_killed_whatever_it_does():
    code = (
        "import os, signal; from packvit.corpus.decode.processes import Worker\n"
        "workers = [Worker(), Worker()]\n"
        "for worker in workers: worker.await_ready()\n"
        "os.kill(workers[0].process.pid, signal.SIGSTOP)\n"  # as one that hangs
        "print(*(worker.process.pid for worker in workers), flush=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        pids = [int(pid) for pid in job.stdout.readline().split()]
        assert len(pids) == 2
        assert all(memory(pid) for pid in pids)
        job.kill()
    for pid in pids:
        wait_for(lambda pid=pid: not memory(pid))  # nor has a zombie any


def test_pixels_being_decoded_stay_within_the_budget_but_for_one_image_alone():
    queue = DecodeQueue(Decoders(8, pixels_in_flight=100), [], PREPROCESSING, AHEAD)
    lock, held, worst = Lock(), [], []

    def decode(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            count = draw.choice((5, 30, 60, 250))
            queue.admit(count)
            with lock:
                held.append(count)
                worst.append((len(held), sum(held)))
            with lock:
                held.remove(count)
            queue.release_pixels(count)

    threads = [Thread(target=decode, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(images == 1 or total <= 100 for images, total in worst)
    assert len(worst) == 1600


def test_tasks_are_as_large_as_half_of_what_may_wait_has_room_for_from_every_worker():
    draw = random.Random(0)
    preprocessing = replace(PREPROCESSING, decode="gpu")
    for _ in range(1000):
        count, each = draw.randint(1, 64), draw.randint(1, 2_000_000)
        decoders = Decoders(count, pixels_in_flight=draw.randint(1, 300_000_000))
        queue = DecodeQueue(decoders, [], preprocessing, AHEAD)
        assert queue.together() == 1  # nothing is known of them yet
        queue.finished, queue.finished_pixels = 7, 7 * each
        queue.held = draw.randint(0, decoders.pixels)
        many, room = queue.together(), min(queue.ahead, decoders.pixels - queue.held)
        assert many == 1 or 2 * many * count * each <= room
        assert many == TOGETHER or 2 * (many + 1) * count * each > room
    assert DecodeQueue(Decoders(1), [], PREPROCESSING, AHEAD).together() == 1


def test_a_line_that_is_stopped_asks_for_no_rest_of_a_task():
    queue = DecodeQueue(Decoders(1), [], PREPROCESSING, AHEAD)
    queue.await_room(queue.wanted)
    queue.stop()
    with pytest.raises(Stopped):
        queue.await_room(queue.wanted)


def test_few_images_wait_for_whoever_is_slower_than_the_workers(tmp_path: Path):
    write_good(tmp_path, 30)
    inputs = list(list_inputs([str(tmp_path)]))
    taken, most = 0, 0

    def count() -> Iterator[Input]:
        nonlocal most
        for number, source in enumerate(inputs, 1):
            most = max(most, number - taken)
            yield source

    with Decoders(2) as decoders:
        for _ in decoders.prepare_all(count(), PREPROCESSING, 1):
            taken += 1
    assert taken == 30
    # Two done before the wanted one, or two under way beside it, and the one just handed over.
    assert most <= 5


def test_workers_that_cannot_start_are_an_error_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_good(tmp_path, 3)
    inputs = list(list_inputs([str(tmp_path)]))
    for executable, message in (
        (
            "/bin/false",
            "ended 4 times before their first image: the last one ended with exit code 1; see what "
            "this says: /bin/false -c",
        ),
        ("/nowhere", "could not be started: No such file"),
    ):
        monkeypatch.setattr(sys, "executable", executable)
        with Decoders(2) as decoders, pytest.raises(DecoderError, match=message):
            list(decoders.prepare_all(inputs, PREPROCESSING, AHEAD))


def strike_young(most: int, struck: list[int], done: Event) -> Thread:
    """Kill new decode workers as soon as they are there, up to `most` of them."""

    def strike() -> None:
        while len(struck) < most and not done.is_set():
            for pid in set(children(os.getpid())) - set(struck):
                if len(struck) < most:
                    os.kill(pid, signal.SIGKILL)
                    struck.append(pid)
            time.sleep(0.002)

    striking = Thread(target=strike)
    striking.start()
    return striking


def test_workers_that_are_killed_while_they_start_are_started_again(
    tmp_path: Path, encoder: Encoder
):
    """V9"""
    write_good(tmp_path / "photos", 12)
    packvit.embed(tmp_path / "photos", out=tmp_path / "right", model=encoder, workers=2)
    struck: list[int] = []
    striking = strike_young(3, struck, done := Event())
    summary = packvit.embed(tmp_path / "photos", out=tmp_path / "out", model=encoder, workers=2)
    done.set()
    striking.join()
    assert len(struck) == 3
    assert (summary.ok, summary.errors) == (12, {})
    part = "part-00000.parquet"
    (found,), (right,) = (list((tmp_path / f).rglob(part)) for f in ("out", "right"))
    assert found.read_bytes() == right.read_bytes()
    assert not children(os.getpid())


def test_workers_that_are_killed_again_and_again_end_the_job_with_what_killed_them(
    tmp_path: Path, encoder: Encoder
):
    """V9"""
    write_good(tmp_path / "photos", 3)
    striking = strike_young(1000, [], done := Event())
    with pytest.raises(DecoderError) as ended:
        packvit.embed(tmp_path / "photos", out=tmp_path / "out", model=encoder, workers=2)
    done.set()
    striking.join()
    assert str(ended.value) == (
        "Decode workers ended 4 times before their first image: the last one was killed by signal "
        "9 (SIGKILL); if memory ran out, ask for fewer `workers`."
    )
    assert not children(os.getpid())
    assert packvit.embed(tmp_path / "photos", out=tmp_path / "out", model=encoder).ok == 3


def test_what_lists_the_inputs_may_fail_and_is_heard():
    def listing() -> Iterator[Input]:
        yield Input("gone", "/nowhere")
        raise ConnectionError("the bucket is gone")

    with Decoders(2) as decoders, pytest.raises(ConnectionError, match="the bucket is gone"):
        list(decoders.prepare_all(listing(), PREPROCESSING, AHEAD))


def test_no_commit_is_lost_between_shards(tmp_path: Path, encoder: Encoder):
    (first,) = write_good(tmp_path / "photos", 1)
    for number in range(199):
        path = tmp_path / "photos" / f"{number:03}.jpg"
        if 64 <= number < 128:
            path.touch()  # a shard without a single pack
        else:
            os.link(tmp_path / "photos" / first, path)
    packvit.embed(tmp_path / "photos", out=tmp_path / "out", model=encoder, tokens=True, workers=2)
    entries = read_commits(tmp_path / "out")
    assert [entry.part[10:15] for entry in entries] == ["00000", "00001", "00002", "00003"]
    assert [entry.errors for entry in entries] == [0, 64, 0, 0]
    assert not check_folder(tmp_path / "out").faults


@pytest.mark.soak
def test_unpacking_an_archive_for_longer_than_an_image_may_take_costs_no_image(
    tmp_path: Path, worker: Worker
):
    data, out = encode(Image.new("RGB", (60, 40)), "PNG"), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in (("z.bin", os.urandom(64 << 20)), ("a.png", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path = tmp_path / "x.tar.bz2"
    path.write_bytes(bz2.compress(out.getvalue(), 1))
    sources = list(list_inputs([str(path)]))
    begun = time.monotonic()
    [prepared], _ = worker.prepare(sources, PREPROCESSING, lambda pixels: None, 2.0)
    assert time.monotonic() - begun > 2.0
    assert prepared.row.sha256 == hashlib.sha256(data).hexdigest()
