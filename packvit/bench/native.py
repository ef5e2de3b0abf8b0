"""Batches of one size, at a checkpoint's own: what a user would otherwise give to a plain ViT.

All contenders start from the same normalised pixels on the device, and the time holds their own
patch embedding: a convolution for our peers, for us the cutting of patches too.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import torch

from packvit.bench import NATIVE, SEED, BenchError, BenchOptions, NativeBatch, models
from packvit.bench.contenders import Subject, cut
from packvit.bench.measuring import gpu_state
from packvit.bench.native_peers import AUTOTUNED, NATIVE_BASELINE, NATIVE_PEERS
from packvit.bench.ours import OURS
from packvit.bench.run import Say, choose, choose_ways, describe_run, measure_workload
from packvit.bench.workloads import Workload

FEW = 2  # images, where there is no GPU


def measure_native(
    options: BenchOptions,
    names: Sequence[str],
    say: Say,
    *,
    seconds: float | None = None,
    autotuned: bool = True,
    ways: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a report for each row of `NATIVE` that is named, as soon as it is done.

    `seconds` is how long all may take: contenders and rows that time does not suffice for are
    left out, from the end. `ways` are the contenders to be timed beside the baseline, by their
    titles; all by default. `options.model` and `options.workloads` are not used.

    Raises: BenchError, ImportError for what cannot be measured at all.
    """
    until = None if seconds is None else monotonic() + seconds
    if unknown := [name for name in names if name not in NATIVE]:
        raise BenchError(f"No batch is called {unknown[0]}. Choose of: {', '.join(NATIVE)}.")
    if options.train:
        raise BenchError("--train is not measured on native sizes. Leave one of them out.")
    device, dtype = choose(replace(options, workloads=()))
    if on_gpu := device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    layers = options.layers if on_gpu or options.layers else 2
    compiled = on_gpu if options.compiled is None else options.compiled
    candidates = choose_ways((*NATIVE_PEERS, *OURS, *(AUTOTUNED if autotuned else ())), ways)
    model: models.Model | None = None
    for name in names:
        if until is not None and monotonic() >= until:
            say(f"{name}: no time was left for it")
            continue
        row = NATIVE[name]
        if model is None or model.name != row.model:
            model = models.build(row.model, layers, device, dtype)
        torch.compiler.reset()
        subject = batch(name, row, model, device, dtype, compiled=compiled, small=not on_gpu)
        say(f"{name}: {len(subject.images)} images, {len(subject.patches):,} patches")
        report = describe_run(options, model, device, dtype)
        with torch.inference_mode():
            work = measure_workload(subject, candidates, options, say, until)
        yield report | {
            "row": name,
            "side": row.side,
            "baseline": NATIVE_BASELINE,
            "workloads": [work],
            "gpu_state_after": gpu_state(),
        }


def batch(
    name: str,
    row: NativeBatch,
    model: models.Model,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    small: bool,
) -> Subject:
    """Return pixels drawn from N(0, 1), and the patches that they are; `small` makes it few."""
    images, patch = FEW if small else row.images, model.config.patch
    side = row.side // patch
    draw = torch.Generator(device).manual_seed(SEED)
    shape = (images, 3, row.side, row.side)
    pixels = torch.randn(shape, generator=draw, dtype=torch.float32, device=device).to(dtype)
    title = f"batch of {row.side} x {row.side} pixels"
    work = Workload(name, title, ((1, side, side),) * images, small)
    patches = cut(pixels, patch, "hwc")
    return Subject(model, work, patches, compiled, False, pixels, row.timm)
