"""What one host's GPUs do together: photographs to parts on 1, 2 and 4 of them.

The photographs of `benchmarks.feeding` (JPEGs of about 1.2 MP, at most 650 patches each),
AIMv2-large's size with random weights in bfloat16, equal work for each GPU. Every job is a process
of its own, from its start to its end; "steady" is the rate from when a fifth of the rows is settled
to nine tenths, "whole" includes start-up. A job of all images on one GPU is the baseline of "whole,
the same work".

    python -m benchmarks.scaling --images 6000 > benchmarks/results/scaling-h200.json
    python -m benchmarks.scaling --model tiny --images 24    # whether it runs, on a CPU
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packvit.bench.measuring import gpu_state, where

STEADY = (0.2, 0.9)  # of the rows


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="The GPUs of one host, together.")
    parser.add_argument("--model", choices=["aimv2-large", "tiny"], default="aimv2-large")
    parser.add_argument("--images", type=int, default=6000, help="for each GPU")
    parser.add_argument("--max-patches", type=int, default=650)
    parser.add_argument("--decode", nargs="+", choices=["gpu", "pil"], default=["gpu", "pil"])
    parser.add_argument("--ray", action="store_true", help="also by Ray, all GPUs")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_process:
        return embed(**json.loads(asked.in_process))
    json.dump(where() | measure(asked), sys.stdout, indent=2)
    print()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the report."""
    import torch

    from benchmarks.feeding import build, write_photographs

    gpus = torch.cuda.device_count()
    counts = [count for count in (1, 2, 4, 8) if count <= max(gpus, 2)]
    kinds = asked.decode if gpus else ["pil"]
    with TemporaryDirectory() as scratch:
        folder, model = Path(scratch) / "photos", Path(scratch) / "model"
        write_photographs(folder, asked.images * counts[-1], min(512, asked.images))
        build(asked.model, torch.device("cuda" if gpus else "cpu")).save_pretrained(model)
        torch.cuda.empty_cache()
        jobs: list[dict[str, Any]] = []

        def add(count: int, images: int, kind: str, ray: str | None = None) -> None:
            few = Path(scratch) / f"photos-{images}"
            if not few.exists():
                few.mkdir()
                for path in sorted(folder.iterdir())[:images]:
                    os.link(path, few / path.name)
            words = {
                "photos": str(few),
                "model": str(model),
                "out": f"{scratch}/out-{len(jobs)}",
                "kind": kind,
                "processes": count,
                "ray": ray,
                "max_patches": asked.max_patches,
            }
            found = run(words) | {"gpus": count, "images": images, "decode": kind}
            jobs.append(found | {"by": "Ray" if ray else "processes"})
            print(jobs[-1] | {"parts": "..."}, file=sys.stderr, flush=True)

        for kind in kinds:
            for count in counts:
                add(count, asked.images * count, kind)
            for count in counts[1:]:
                add(1, asked.images * count, kind)
            if asked.ray:
                add(counts[-1], asked.images * counts[-1], kind, "local")
    return {
        "gpu_state": gpu_state(),
        "model": asked.model,
        "cpus": len(os.sched_getaffinity(0)),
        "jobs": [{name: job[name] for name in job if name != "parts"} for job in jobs],
        "results": compare(jobs),
    }


def run(words: dict[str, Any]) -> dict[str, Any]:
    """Return what a job did, in a process of its own."""
    began = time.time()
    return finish(start(words)) | {"whole_seconds": time.time() - began}


def start(words: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a job in a process of its own; `words` are the arguments of `embed`."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scaling", "--in-process", json.dumps(words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a job did, once it has ended."""
    said, remarks = job.communicate()
    if job.returncode:
        raise SystemExit(remarks)
    return json.loads(said)


def compare(jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many times as fast as one GPU each job is, and whether it wrote the same bytes."""
    results = {}
    for job in jobs:
        if job["gpus"] == 1:
            continue
        alike = [j for j in jobs if j["gpus"] == 1 and j["decode"] == job["decode"]]
        same = next(j for j in alike if j["images"] == job["images"])
        name = f"{job['gpus']} GPUs, {job['decode']}, {job['by']}"
        results[name] = {
            "steady": job["steady_images_per_second"] / alike[0]["steady_images_per_second"],
            "whole, the same work": same["whole_seconds"] / job["whole_seconds"],
            "same bytes as one GPU": job["parts"] == same["parts"],
        }
    return results


def embed(
    photos: str,
    model: str,
    out: str,
    kind: str,
    processes: int,
    ray: str | None,
    max_patches: int,
) -> None:
    """Run a job in this process, and print what it did."""
    import packvit
    from packvit.corpus.folder.layout import read_commits
    from packvit.corpus.folder.stores import find_folder
    from packvit.corpus.progress import Progress

    told: list[tuple[float, int]] = []

    def tell(progress: Progress) -> None:
        told.append((time.perf_counter(), progress.settled))

    done = packvit.embed(
        photos,
        model=model,
        out=out,
        decode="gpu" if kind == "gpu" else "pil",
        processes=processes,
        ray=ray,
        max_patches=max_patches,
        progress=tell,
    )
    first, last = (next(each for each in told if each[1] >= part * done.rows) for part in STEADY)
    report = {
        "steady_images_per_second": (last[1] - first[1]) / max(last[0] - first[0], 1e-9),
        "images_per_second": done.images_per_second,
        "errors": done.errors,
        "parts": [entry.sha256 for entry in read_commits(find_folder(out))],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
