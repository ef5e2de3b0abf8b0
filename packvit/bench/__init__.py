"""Our figures beside our peers' and the machine's own limits, in one run. No torch here.

`models.py` has the weights, `workloads.py` the packs, `ours.py` and `peers.py` the contenders,
`measuring.py` the clock, `job.py` runs them all, and `table.py` prints what came of it.
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
SEED = 455  # what the fixed mix has been drawn from in all records


class BenchError(Exception):
    """What was asked for cannot be measured."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured, and how; None is chosen by the machine."""

    model: str = "aimv2-large"
    workloads: tuple[str, ...] = ("mixed",)
    train: bool = False  # forward and backward
    rounds: int = 11
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None  # cut a random model to so many
    clock: str = "wall"  # or "cpu": the time that all threads were at work, on a CPU
    compiled: bool | None = None  # whether to wait for torch.compile; on a GPU, unless told
