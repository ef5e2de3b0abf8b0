"""How much of an encoder's own speed a whole job reaches from JPEGs, decoded by the GPU and Pillow.

Photographs of scikit-image and scikit-learn at about 1.2 MP, saved as JPEG 4:2:0 of quality 90,
listed many times under names of their own and resized to at most 650 patches; AIMv2-large's size
with random weights in bfloat16. The encoder's own speed is that of its forwards over the very packs
of the job, in its order, the first few hundred of them: patches lie on the device already, pooled
vectors are copied back, and a pack is launched while the one before is under way, by the job's own
functions. Nothing is read, decoded or written. "from the host" is the same with patches that are
copied over, as Pillow's are.

A job is timed as `packvit embed` says it (from the first input to the last part, without loading
the model), by its steady state (from when a fifth of the rows is settled to nine tenths), and
whole, with the digest of the weights that a job with a loaded encoder takes. Contenders take turns
in rounds, Pillow in the first alone. What the workers, and the device's decoder, do by themselves
is measured too, since the slowest of them bounds a job. `--formats png webp` adds jobs from the
same photographs in other formats (WebP of quality 90), and what the workers make of them.

    python -m benchmarks.feeding > benchmarks/results/feeding-h100.json
    python -m benchmarks.feeding --formats png webp --rounds 1
    python -m benchmarks.feeding --model tiny --device cpu --images 64    # whether it runs
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, features

import packvit
from benchmarks.decoding import large
from demo.photographs import photographs
from packvit import config as configs
from packvit.bench.measuring import gpu_state, synchronize, where
from packvit.bench.models import config_of
from packvit.corpus import UsageError
from packvit.corpus.decode.prepare import Decode, Prepared
from packvit.corpus.encode.context import EmbedContext, make_context
from packvit.corpus.encode.packs import OnDevice, PendingPack, Ready, collect, submit
from packvit.corpus.folder.layout import read_commits
from packvit.corpus.inputs.find import list_inputs
from packvit.corpus.inputs.sources import Input
from packvit.corpus.job import fair_workers
from packvit.corpus.progress import Progress
from packvit.corpus.settings import EmbedOptions, choose_rows, fit_options
from packvit.encoder import Encoder
from packvit.families import AIMv2Packing
from packvit.gpu.nvjpeg import ask_for_queues
from packvit.packs.planning import plan_packs

PIXELS = configs.ImageConfig(14, *configs.HALF_STATISTICS, "bicubic", None)
STEADY = (0.2, 0.9)  # of the rows
OWN = 240  # packs that the encoder's own speed is taken over; a job is longer than what starts it
KINDS: tuple[Decode, ...] = ("gpu", "pil")
FORMATS = ("png", "webp")  # beside JPEG


@dataclass(frozen=True)
class Load:
    """What all contenders work on: photographs, and the packs that the job makes of them."""

    folder: Path
    inputs: Sequence[Input]
    prepared: Sequence[Prepared]  # of the distinct ones, by Pillow
    packs: Sequence[Sequence[int]]  # places in `inputs`, which repeat the distinct ones in turn

    def pack(self, images: Sequence[Ready], number: int) -> list[Ready]:
        """Return a pack's images, given those of all distinct ones."""
        return [images[place % len(images)] for place in self.packs[number]]


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="A job's speed beside its encoder's.")
    parser.add_argument("--model", choices=["aimv2-large", "tiny"], default="aimv2-large")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=18_000)
    parser.add_argument("--distinct", type=int, default=512)
    parser.add_argument("--max-patches", type=int, default=650)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=[], help="Beside JPEG.")
    parser.add_argument("--workers", type=int, default=fair_workers(None))
    asked = parser.parse_args()
    with TemporaryDirectory() as scratch:
        report = measure(asked, Path(scratch))
    json.dump(report, sys.stdout, indent=2)
    print()


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the report."""
    ask_for_queues()  # as a job does before it loads its encoder
    encoder = build(asked.model, torch.device(asked.device))
    options = fit_options(
        encoder, EmbedOptions(workers=asked.workers, max_patches=asked.max_patches)
    )
    load = make_load(encoder, options, scratch / "photos", asked.images, asked.distinct)
    gpu, missing = replace(options, decode="gpu"), None
    with gpu.decoders() as decoders:
        try:
            context = make_context(encoder, gpu, decoders)
        except UsageError as error:
            missing, context = str(error), None
        kinds = KINDS[1:] if context is None else KINDS
        say("the workers by themselves, and the device's decoder")
        stages = measure_stages(context or EmbedContext(encoder, gpu, decoders), load)
    for kind in asked.formats:
        say(f"writing {len(load.prepared)} photographs as {kind}")
        write_photographs(scratch / kind, asked.images, len(load.prepared), kind)
    for kind in ("jpeg", *asked.formats):
        say(f"the workers by themselves, Pillow and {kind}")
        inputs = list(list_inputs([str(load.folder if kind == "jpeg" else scratch / kind)]))
        with options.decoders() as decoders:
            stages[kind], _ = measure_workers(EmbedContext(encoder, options, decoders), inputs)
    state = gpu_state()
    say("warming up")
    alone(encoder, options, load, load.prepared, 3)
    few = scratch / "few"
    few.mkdir()
    for path in sorted(load.folder.iterdir())[:100]:
        os.link(path, few / path.name)
    for kind in kinds:
        job(encoder, options, few, scratch / "out", kind)
    taken: dict[str, list[dict[str, Any]]] = {}
    on_device: list[Ready] = [
        OnDevice(image.row, torch.from_numpy(image.patches).to(encoder.device))
        for image in load.prepared
        if image.patches is not None
    ]
    for turn in range(asked.rounds):
        contenders: dict[str, Callable[[], dict[str, Any]]] = {
            "encoder": lambda: alone(encoder, options, load, on_device, OWN),
            "encoder from the host": lambda: alone(encoder, options, load, load.prepared, OWN),
        }
        for kind in kinds[: None if turn == 0 else -1]:
            contenders[f"job, {kind}"] = lambda kind=kind: job(
                encoder, options, load.folder, scratch / "out", kind
            )
        for kind in asked.formats if turn == 0 else ():
            contenders[f"job, {kind}"] = lambda kind=kind: job(
                encoder, options, scratch / kind, scratch / "out", "pil"
            )
        for name, run in contenders.items():
            taken.setdefault(name, []).append(run())
            say(f"round {turn + 1}, {name}: {taken[name][-1]['images_per_second']:,.0f} images/s")
    report = where() | {
        "pillow": Image.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "gpu_state": {"before": state, "after": gpu_state()},
        "workload": {
            "model": asked.model,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "attention": encoder.attention,
            "images": len(load.inputs),
            "distinct": len(load.prepared),
            "bytes_each": sum(os.path.getsize(s.path) for s in load.inputs) // len(load.inputs),
            "patches_each": sum(i.row.patches for i in load.prepared) / len(load.prepared),
            "packs": len(load.packs),
            "workers": asked.workers,
        },
        "rounds": taken,
        "stages": stages,
        "results": summarise(taken),
    }
    if missing:
        return report | {"missing": {"job, gpu": missing}}
    by_kind = [taken[f"job, {kind}"][0].get("parts") for kind in KINDS]
    return report | {"parts_are_the_same_bytes": by_kind[0] == by_kind[1]}


def summarise(taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of all contenders, and what part of the encoder's own speed they reach."""
    own = median(each["images_per_second"] for each in taken["encoder"])
    results: dict[str, Any] = {}
    for name, rounds in taken.items():
        rate = median(each["images_per_second"] for each in rounds)
        results[name] = {"images_per_second": rate, "of_the_encoders_own": rate / own}
        if "steady_images_per_second" in rounds[0]:
            steady = median(each["steady_images_per_second"] for each in rounds)
            results[name] |= {
                "steady_images_per_second": steady,
                "steady_of_the_encoders_own": steady / own,
            }
    return results


def say(text: str) -> None:
    """Tell on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def build(name: str, device: torch.device) -> Encoder:
    """Return the encoder, with random weights that are the same each time."""
    if name == "tiny":
        return packvit.load("tiny", device=device)
    torch.manual_seed(0)
    with device:
        encoder = AIMv2Packing(config_of("aimv2-large"), PIXELS)
        for weight in encoder.parameters():
            torch.nn.init.ones_(weight) if weight.ndim == 1 else torch.nn.init.normal_(
                weight, std=weight[0].numel() ** -0.5
            )
    return encoder.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def make_load(
    encoder: Encoder, options: EmbedOptions, folder: Path, images: int, distinct: int
) -> Load:
    """Write the photographs, and prepare what the encoder alone is measured with."""
    distinct = min(distinct, images)
    say(f"writing {distinct} photographs")
    write_photographs(folder, images, distinct)
    inputs = list(list_inputs([str(folder)]))
    say("preparing them by Pillow, for the encoder alone")
    with options.decoders() as decoders:
        preprocessing = EmbedContext(encoder, options, decoders).preprocessing
        prepared = list(decoders.prepare_all(inputs[:distinct], preprocessing, 1 << 30))
    packs: list[list[int]] = []
    rows = choose_rows(encoder.device, images, large=False)
    for start in range(0, images, rows):
        places = range(start, min(start + rows, images))
        lengths = [prepared[place % distinct].row.patches for place in places]
        packs += [
            [start + place for place in pack] for pack in plan_packs(lengths, options.token_budget)
        ]
    return Load(folder, inputs, prepared, packs)


def write_photographs(folder: Path, images: int, distinct: int, kind: str = "jpeg") -> None:
    """Write photographs into a new folder, the distinct ones again and again."""
    folder.mkdir()
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda n: large(photos[n % len(photos)], n, kind), range(distinct))
        for number, data in enumerate(made):
            (folder / f"{number:06}.{kind}").write_bytes(data)
    for number in range(distinct, images):
        os.link(folder / f"{number % distinct:06}.{kind}", folder / f"{number:06}.{kind}")


def measure_workers(
    context: EmbedContext, inputs: Sequence[Input]
) -> tuple[dict[str, Any], Sequence[Prepared]]:
    """Return what the workers do by themselves with some inputs, and those prepared."""
    inputs = inputs[:2000]
    list(context.decoders.prepare_all(inputs[:100], context.preprocessing, 1 << 24))
    start, cpu = time.perf_counter(), time.process_time()
    prepared = list(context.decoders.prepare_all(inputs, context.preprocessing, 1 << 30))
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    rates = {
        "workers_images_per_second": len(inputs) / taken,
        "main_process_cpu_microseconds_an_image": cpu / len(inputs) * 1e6,
    }
    return rates, prepared


def measure_stages(context: EmbedContext, load: Load) -> dict[str, Any]:
    """Return what the workers do by themselves, up to planned JPEGs, and the device's decoder."""
    stages, jpegs = measure_workers(context, load.inputs)
    few = [list(pack) for pack in load.packs[:40]]
    if context.decode_jpegs is None:
        return stages
    files = [image.jpeg for image in jpegs[: len(load.prepared)]]
    times = []
    for pack in few:
        ours = [file for place in pack if (file := files[place % len(files)])]
        start = time.perf_counter()
        context.decode_jpegs([file.data for file in ours], [file.plan for file in ours])
        times.append((time.perf_counter() - start) / len(ours))
    return stages | {"decoder_images_per_second": 1 / median(times)}


def alone(
    encoder: Encoder,
    options: EmbedOptions,
    load: Load,
    images: Sequence[Ready],
    packs: int | None = None,
) -> dict[str, Any]:
    """Return how fast the encoder is, its patches being there: the job's loop without the rest."""
    behind: PendingPack | None = None
    numbers = range(len(load.packs))[:packs]
    synchronize()
    start = time.perf_counter()
    for number in numbers:
        pending = submit(encoder, load.pack(images, number), options)
        if behind:
            collect(behind, options.dtype_out)
        behind = pending
    assert behind
    collect(behind, options.dtype_out)
    count = sum(len(load.packs[number]) for number in numbers)
    taken = time.perf_counter() - start
    return {"seconds": taken, "images_per_second": count / taken}


def job(
    encoder: Encoder, options: EmbedOptions, folder: Path, out: Path, kind: Decode
) -> dict[str, Any]:
    """Return what a job took."""
    told: list[tuple[float, int]] = []

    def tell(progress: Progress) -> None:
        told.append((time.perf_counter(), progress.settled))

    start = time.perf_counter()
    done = packvit.embed(
        folder,
        out=out,
        model=encoder,
        decode=kind,
        workers=options.workers,
        max_patches=options.max_patches,
        progress=tell,
    )
    whole = time.perf_counter() - start
    parts = [entry.sha256 for entry in read_commits(out)]
    shutil.rmtree(out)
    first, last = (next(each for each in told if each[1] >= part * done.rows) for part in STEADY)
    return {
        "seconds": done.seconds,
        "images_per_second": done.images_per_second,
        "steady_images_per_second": (last[1] - first[1]) / max(last[0] - first[0], 1e-9),
        "whole_seconds": whole,
        "errors": done.errors,
        "on_gpu": done.on_gpu,
        "halved": done.halved,
        "shares": asdict(done.shares),
        "parts": parts,
    }


if __name__ == "__main__":
    main()
