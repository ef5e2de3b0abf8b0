"""How much memory jobs take for each of the attacks: `python -m tests.peaks FOLDER [NAME ...]`.

Each is embedded by `packvit.embed` with one decode worker. Per attack it prints how its rows end,
and what the worker and the process that lists took at most, in MiB. What is an image's own are the
bytes of its file and 8 bytes a pixel, 16 of AVIF and WebP.
"""

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

import packvit
from packvit.corpus import UsageError

SECONDS = 0.01  # between looks at the processes
WORKER = b"packvit.corpus.decode.worker"


@dataclass(frozen=True, slots=True)
class Peak:
    """What a job took at most. Units: bytes."""

    worker: int
    listing: int  # beyond what the process held before
    statuses: dict[str, int]
    seconds: float
    pixels: int  # what an image may take: 8 bytes a pixel, 16 of AVIF and WebP


def status(process: int | str) -> dict[str, str]:
    """Return what the system says of a process; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in lines)


def command(process: int) -> bytes:
    """Return the command line of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def held(process: int | str, what: str) -> int:
    """Return the bytes of VmHWM or VmRSS of a process."""
    return int(status(process).get(what, "0").split()[0]) << 10


def children() -> Iterator[int]:
    """Yield the processes that this one has started."""
    for task in Path("/proc/self/task").iterdir():
        try:
            yield from map(int, (task / "children").read_text().split())
        except OSError:
            continue


@contextmanager
def watching() -> Iterator[list[int]]:
    """Give the most that any child held, updated until the context ends."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS):
            for child in children():
                if WORKER in command(child):  # before, it is a copy of this process
                    peak[0] = max(peak[0], held(child, "VmHWM"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(named: str, encoder: packvit.Encoder, *, seconds: float = 60.0) -> Peak:
    """Embed what a path or URL names, and return what that took."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, start = held("self", "VmRSS"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, watching() as peak:
        out = Path(folder) / "out"
        try:
            packvit.embed(
                named, out=out, model=encoder, workers=1, max_patches=16, image_timeout=seconds
            )
            names = ["status", "width", "height"]
            tables = [pq.read_table(part, columns=names) for part in out.glob("data/*.parquet")]
            rows = [row for table in tables for row in table.to_pylist()]
            statuses = Counter(row["status"] for row in rows)
        except UsageError as error:
            rows, statuses = [], Counter([f"refused: {error}"])
        listing = held("self", "VmHWM") - before
    each = 16 if named.endswith((".avif", ".webp")) else 8
    pixels = max(((row["width"] or 0) * (row["height"] or 0) for row in rows), default=0)
    return Peak(peak[0], listing, dict(statuses), time.monotonic() - start, each * pixels)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    found = sorted(Path(sys.argv[1]).iterdir())
    found = [path for path in found if not sys.argv[2:] or path.name in sys.argv[2:]]
    tiny = packvit.load("tiny", device="cpu")
    for path in found:
        peak = measure(str(path), tiny)
        print(
            f"{path.name:28} worker {peak.worker >> 20:6} pixels {peak.pixels >> 20:5} "
            f"file {path.stat().st_size >> 20:5} listing {peak.listing >> 20:6} "
            f"{peak.seconds:6.1f} s {peak.statuses}",
            flush=True,
        )
