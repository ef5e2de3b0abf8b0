"""Benchmark our encoders against their peers and the machine's limits. No torch here.

`models.py` has the weights, `workloads.py` the packs, `ours.py` and `peers.py` the contenders,
`measuring.py` the clock, `run.py` runs them all, and `table.py` prints the report.
"""

from dataclasses import dataclass

MODELS = ("aimv2-large", "siglip2-so400m")  # built with random weights, at the published sizes
WORKLOADS = {
    "mixed": "mixed sizes",
    "tiny-images": "many tiny images",
    "huge": "one huge image",
    "equal": "equal sizes",
    "small": "a small pack (latency)",
}
DTYPES = ("bfloat16", "float16", "float32")
SEED = 455  # of the fixed workloads in all records


class BenchError(Exception):
    """The benchmark cannot run as asked."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure, and how; None is chosen for the machine."""

    model: str = "aimv2-large"
    workloads: tuple[str, ...] = ("mixed",)
    train: bool = False  # forward and backward
    rounds: int = 11
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None  # of a random model, instead of all
    clock: str = "wall"  # or "cpu": CPU time of all threads
    compiled: bool | None = None  # include torch.compile; by default on a GPU
