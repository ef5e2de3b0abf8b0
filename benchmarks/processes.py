"""How much two processes on two CPUs do of what one does on one, from files to parts. Linux.

Each encodes on one thread and decodes in one worker beside it, with the model of the package, and
what each takes to start is counted: that is why the photographs are many. A job may use as many
CPUs as it has processes: a single one would else decode on the second.

CPU seconds are those of all processes of a job. Where `cpus_had` of two processes is far below 2,
other programs had the rest of the machine, and the ratio of the times is theirs as well. What then
remains is `times_faster_if_alone`: what the CPU seconds come to on a CPU for each process, none of
which waits for another.

python -m benchmarks.processes
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

import packvit
from packvit.bench.measuring import interleave, median_ms, times_faster, where

BASELINE = "1 process"
PHOTOS = 400
PATCHES = 256


def write_photos(folder: Path) -> None:
    """Write photographs of slopes and noise, 640 by 480."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:480, 0:640]
    slopes = np.stack([rows, columns, rows + columns], axis=2) * 200 // 1120
    for number in range(PHOTOS):
        noise = draw.integers(0, 40, slopes.shape)
        Image.fromarray((slopes + noise).astype(np.uint8)).save(folder / f"{number}.jpg")


def name(count: int) -> str:
    """Return what a job of so many processes is called."""
    return BASELINE if count == 1 else f"{count} processes"


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all that it started and that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


@contextmanager
def on_cpus(count: int) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, to so many CPUs."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def main() -> None:
    """Print one JSON object with the machine and the results."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        write_photos(photos)
        spent: dict[str, list[tuple[float, float]]] = {}  # wall and CPU seconds of each job

        def embed(count: int) -> None:
            wall, used = time.perf_counter(), cpu_seconds()
            with on_cpus(count):
                packvit.embed(
                    photos,
                    out=Path(scratch) / str(count),
                    model="tiny",
                    device="cpu",
                    max_patches=PATCHES,
                    tokens=True,  # for parts of 64, so that there are many to share
                    workers=1,
                    processes=count,
                    overwrite=True,
                )
            took = time.perf_counter() - wall, cpu_seconds() - used
            spent.setdefault(name(count), []).append(took)

        runs = {name(count): partial(embed, count) for count in (1, 2)}
        taken = interleave(runs, rounds=3, warmup=0)
    cpu = {run: statistics.median(used for _, used in spent[run]) for run in runs}
    results = {
        run: {
            "median_ms": median_ms(taken, run),
            "times_faster_than_baseline": times_faster(taken, run, BASELINE),
            "cpu_seconds": cpu[run],
            "times_faster_if_alone": count * cpu[name(1)] / cpu[name(count)],
            "cpus_had": statistics.median(used / wall for wall, used in spent[run]),
        }
        for count, run in enumerate(runs, 1)
    }
    load = {"photos": PHOTOS, "patches": PATCHES, "model": "tiny"}
    report = where() | {"workload": load, "baseline": BASELINE, "results": results}
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
