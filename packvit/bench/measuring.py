"""Time contenders, and describe the machine.

Contenders take turns within each round, in shuffled order, so that clock drift or other load slows
all of them alike. The report has medians over the rounds, and quartiles of the ratio of two
contenders in each round: widely spread quartiles mean that the machine was busy.
"""

import random
import signal
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time
from types import FrameType
from typing import Any

import torch

from packvit.verification.machine import machine

Run = Callable[[], object]
Times = Mapping[str, float]  # seconds of one round, by contender
CEILING = "matmul ceiling"
# CPU time counts all threads of this process only, for machines shared with other programs.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Run, clock: str = "wall") -> float:
    """Time one call, from an idle device to an idle device, by one of `CLOCKS`."""
    now = CLOCKS[clock]
    synchronize()
    start = now()
    run()
    synchronize()
    return now() - start


def interleave(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    warmup: int,
    fewer: Mapping[str, int] | None = None,
    clock: str = "wall",
) -> list[Times]:
    """Return the times of every round, after `warmup` rounds that are not kept.

    `fewer` gives slow contenders a smaller number of rounds, and no warm-up: they have run
    before.
    """
    shuffle, taken = random.Random(0), []
    for turn in range(-warmup, rounds):
        present = [
            name
            for name in runs
            if (fewer or {}).get(name, rounds) > turn and (turn >= 0 or name not in (fewer or {}))
        ]
        order = shuffle.sample(present, len(present))
        taken.append({name: seconds(runs[name], clock) for name in order})
    return taken[warmup:]


def median_ms(taken: Sequence[Times], name: str) -> float:
    """Return a contender's median time in milliseconds."""
    return statistics.median(times[name] for times in taken if name in times) * 1e3


def times_faster(taken: Sequence[Times], name: str, than: str) -> list[float]:
    """Return the quartiles of how many times faster one contender was, over shared rounds."""
    both = [times[than] / times[name] for times in taken if {name, than} <= times.keys()]
    return statistics.quantiles(both, n=4, method="inclusive")  # within the observed range


def ceiling(device: torch.device, dtype: torch.dtype) -> tuple[Run, float]:
    """Return a function that runs large matmuls, and its floating-point operations.

    On N(0, 1) data: zeros would draw less power and clock higher. On a GPU several in a row, since
    the first after an idle contender runs at a lower clock: next to a contender with 4 s of small
    launches, a single matmul ran at half the usual rate.
    """
    side, times = (8192, 8) if device.type == "cuda" else (1024, 1)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return run, 2.0 * times * side**3


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Return the peak GPU memory of one call, on top of what was allocated before."""
    if device.type != "cuda":
        return None
    synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_state() -> str | None:
    """Return clocks, power and temperature as nvidia-smi reports them."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if not torch.cuda.is_available():
        return None
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def where() -> dict[str, Any]:
    """Return the date, the machine and the versions."""
    return {"date": datetime.now(UTC).date().isoformat()} | machine()


def commit() -> str:
    """Return the commit that runs, with a "+" if the sources differ from it, or "unknown"."""
    folder = Path(__file__).parents[2]
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "-uno", "--", "packvit"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}+" if changes else head


@contextmanager
def at_most(allowed: float | None) -> Iterator[None]:
    """Stop what takes longer than `allowed` seconds, between two lines of Python.

    Raises: TimeoutError.
    """
    if allowed is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {allowed:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, allowed, 5.0)  # again, should a callback swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
