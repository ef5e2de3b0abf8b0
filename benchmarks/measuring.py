"""How every benchmark here is timed, and what it says of the machine it ran on.

Contenders take turns within each round, in shuffled order, so that a clock that drifts or a
neighbour on the machine slows them all alike. Reported are the median over the rounds, and the
quartiles of each round's ratio to the baseline: far apart, they say the machine was busy.
"""

import random
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import torch

from packvit.support import machine


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Time one call, from an idle device to an idle device."""
    synchronize()
    start = perf_counter()
    run()
    synchronize()
    return perf_counter() - start


def interleave(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, baseline: str
) -> dict[str, Any]:
    """Return every contender's median milliseconds and its ratio to the baseline, by rounds."""
    shuffle = random.Random(0)
    taken: list[dict[str, float]] = []
    for _ in range(warmup + rounds):
        order = shuffle.sample(list(runs), len(runs))
        taken.append({name: seconds(runs[name]) for name in order})
    kept = taken[warmup:]
    return {
        name: {
            "median_ms": statistics.median(r[name] for r in kept) * 1e3,
            "times_faster_than_baseline": statistics.quantiles(
                [r[baseline] / r[name] for r in kept], n=4
            ),
        }
        for name in runs
    }


SIDE = 8192
CEILING = "matmul ceiling"


def add_ceiling(runs: dict[str, Callable[[], object]], dtype: torch.dtype) -> None:
    """Add the machine's own limit to the contenders: one large matmul on N(0, 1) data."""
    if torch.cuda.is_available():
        a, b = torch.randn(2, SIDE, SIDE, device="cuda", dtype=dtype)
        runs[CEILING] = lambda: a @ b


def add_fractions(results: dict[str, Any], work: float) -> None:
    """Say of each contender what share of the measured matmul rate it reached at `work` FLOPs."""
    if CEILING not in results:
        return
    rate = 2 * SIDE**3 / results[CEILING]["median_ms"] * 1e3
    for name, entry in results.items():
        if name != CEILING:
            entry["fraction_of_ceiling"] = work / entry["median_ms"] * 1e3 / rate
    results[CEILING]["tflops"] = rate / 1e12


def peak_gib(run: Callable[[], object]) -> float | None:
    """Return the device memory that one call takes at its peak, weights included, in GiB."""
    if not torch.cuda.is_available():
        return None
    synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def where() -> dict[str, Any]:
    """Return the date, the machine and the versions, with clocks and power where there is a GPU."""
    found = {"date": datetime.now(UTC).date().isoformat()} | machine()
    if torch.cuda.is_available():
        fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        found["gpu_state"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
    return found
