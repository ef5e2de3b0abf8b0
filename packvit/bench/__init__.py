"""Benchmark our encoders against their peers and the machine's limits. No torch here.

`models.py` has the weights, `workloads.py` the packs, `ours.py` and `peers.py` the contenders,
`correctness.py` says whose tokens are right, `measuring.py` has the clock, `run.py` runs them all,
and `table.py` prints the report. `native.py` does so for batches of one size, beside the peers of
`native_peers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from packvit.corpus import UsageError

MODELS = (  # built with random weights, at the published sizes
    "aimv2-large",
    "siglip2-so400m",
    "clip-l14-quickgelu",
    "clip-l14",
    "siglip-so400m14-384",
    "dinov2-b14",
    "dinov2-l14",
    "dinov3-b16",
    "dinov3-l16",
    "aimv2-l14-224",
    "aimv2-l14-448",
    "qwen3-vit",
    "qwen2.5-vl-vit",
    "qwen2-vl-vit",
    "moonvit-so400m",
    "c-radio-h16",
    "tipsv2-b14",
    "pe-spatial-l14",
)
WORKLOADS = {
    "mixed": "mixed sizes",
    "tiny-images": "many tiny images",
    "large": "mixed sizes of 1,024 to 16,384 patches",
    "huge": "one huge image",
    "equal": "equal sizes",
    "small": "a small pack (latency)",
}
NATIVE_WORKLOAD = "native"  # batches of one size, each a row of `NATIVE`
DTYPES = ("bfloat16", "float16", "float32")
SEED = 455  # of the fixed workloads in all records


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """One batch at a checkpoint's own size. Units: `side` in pixels."""

    model: str  # one of `MODELS`
    side: int
    images: int
    timm: str  # timm's name of the same architecture


# Most important first: what `--seconds` leaves no time for is left out from the end. SigLIP2's
# SO400M/14 at a fixed size is SigLIP's architecture, so that row stands for both; NaFlex is /16.
NATIVE: Mapping[str, NativeBatch] = {
    "clip-l14-224-quickgelu": NativeBatch(
        "clip-l14-quickgelu", 224, 128, "vit_large_patch14_clip_quickgelu_224"
    ),
    "dinov3-l16-512": NativeBatch("dinov3-l16", 512, 32, "vit_large_patch16_dinov3"),
    "dinov2-b14-518": NativeBatch("dinov2-b14", 518, 32, "vit_base_patch14_dinov2"),
    "siglip-so400m14-384": NativeBatch(
        "siglip-so400m14-384", 384, 48, "vit_so400m_patch14_siglip_384"
    ),
    "dinov3-l16-256": NativeBatch("dinov3-l16", 256, 128, "vit_large_patch16_dinov3"),
    "clip-l14-224": NativeBatch("clip-l14", 224, 128, "vit_large_patch14_clip_224"),
    "aimv2-l14-224": NativeBatch("aimv2-l14-224", 224, 128, "aimv2_large_patch14_224"),
    "siglip2-so400m16-384": NativeBatch("siglip2-so400m", 384, 48, "vit_so400m_patch16_siglip_384"),
    "dinov2-l14-518": NativeBatch("dinov2-l14", 518, 32, "vit_large_patch14_dinov2"),
    "dinov3-l16-1024": NativeBatch("dinov3-l16", 1024, 8, "vit_large_patch16_dinov3"),
    "aimv2-l14-448": NativeBatch("aimv2-l14-448", 448, 32, "aimv2_large_patch14_448"),
    "dinov3-b16-512": NativeBatch("dinov3-b16", 512, 32, "vit_base_patch16_dinov3"),
    "dinov3-b16-256": NativeBatch("dinov3-b16", 256, 128, "vit_base_patch16_dinov3"),
    "dinov3-b16-1024": NativeBatch("dinov3-b16", 1024, 8, "vit_base_patch16_dinov3"),
}


class BenchError(UsageError):
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
    commit: str | None = None  # what runs, where git cannot tell
