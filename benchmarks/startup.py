"""How long packvit takes to start: its commands, and a job from its first moment to its last.

Commands are timed beside Python alone and `import torch`. A job is timed from the start of its
process: until its first pack is encoded, and until it has ended. "cold" finds no compiled kernel
(an empty PACKVIT_CACHE); all jobs have the weights in the page cache.

    python -m benchmarks.startup
    python -m benchmarks.startup --job                # on a GPU; AIMv2-large, 1,024 photographs
    python -m benchmarks.startup --job --model tiny --images 64    # whether it runs
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from packvit.bench.measuring import gpu_state, interleave, median_ms, times_faster, where

BASELINE = "python alone"
COMMANDS = {
    BASELINE: ["-c", "pass"],
    "import packvit": ["-c", "import packvit"],
    "packvit --help": ["-m", "packvit", "--help"],
    "packvit embed --help": ["-m", "packvit", "embed", "--help"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    """Print one JSON object with the machine and the results."""
    parser = argparse.ArgumentParser(description="How long packvit takes to start.")
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--model", choices=["aimv2-large", "tiny"], default="aimv2-large")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--max-patches", type=int, default=650)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", nargs="+", choices=["gpu", "pil"], default=["gpu", "pil"])
    parser.add_argument("--in-process", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_process:
        return embed(asked.in_process, asked.max_patches)
    report = time_jobs(asked) if asked.job else time_commands()
    json.dump(where() | report, sys.stdout, indent=2)
    print()


def time_commands() -> dict[str, Any]:
    """Return what commands take that compute nothing."""
    runs = {
        name: partial(subprocess.run, [sys.executable, *words], capture_output=True, check=True)
        for name, words in COMMANDS.items()
    }
    taken = interleave(runs, rounds=15, warmup=2)
    results = {
        name: {
            "median_ms": median_ms(taken, name),
            "times_faster_than_baseline": times_faster(taken, name, BASELINE),
        }
        for name in runs
    }
    return {"baseline": BASELINE, "results": results}


def time_jobs(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what jobs take, in processes of their own."""
    import torch

    from benchmarks.feeding import build, write_photographs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taken: dict[str, list[dict[str, float]]] = {}
    with TemporaryDirectory() as scratch:
        photos, model = Path(scratch) / "photos", Path(scratch) / "model"
        write_photographs(photos, asked.images, min(64, asked.images))
        build(asked.model, device).save_pretrained(model)
        kinds = asked.decode if device.type == "cuda" else ["pil"]
        for number in range(asked.rounds + 1):
            for kind in kinds:
                name = f"{'warm' if number else 'cold'}, {kind}"
                caches = Path(scratch) / f"kernels-{kind}"
                one = time_job(photos, model, Path(scratch) / "out", kind, caches)
                taken.setdefault(name, []).append(one)
                print(f"{name}: {one}", file=sys.stderr, flush=True)
    return {
        "gpu_state": gpu_state(),
        "images": asked.images,
        "model": asked.model,
        "rounds": taken,
        "results": {
            name: {what: median(each[what] for each in rounds) for what in rounds[0]}
            for name, rounds in taken.items()
        },
    }


def time_job(photos: Path, model: Path, out: Path, kind: str, caches: Path) -> dict[str, float]:
    """Return the seconds from a process's start to its first pack, and to its end."""
    words = ["-m", "benchmarks.startup", "--in-process", photos, model, out, kind]
    began = time.time()
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PACKVIT_CACHE": str(caches)},
        check=False,
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(done.stdout)
    shutil.rmtree(out)
    return {
        "first_pack_seconds": told["first_pack"] - began,
        "whole_seconds": ended - began,
        "embedding_seconds": told["embedding"],
    }


def embed(words: Sequence[str], max_patches: int) -> None:
    """Run a job in this process; print when its first pack was encoded."""
    import packvit
    from packvit.cli.program import end_now
    from packvit.corpus.progress import Progress

    first: list[float] = []

    def tell(progress: Progress) -> None:
        if progress.settled and not first:
            first.append(time.time())

    photos, model, out, kind = words
    done = packvit.embed(
        photos,
        model=model,
        out=out,
        decode="gpu" if kind == "gpu" else "pil",
        max_patches=max_patches,
        progress=tell,
    )
    if done.errors or (kind == "gpu") != bool(done.on_gpu):
        raise SystemExit(f"the job went wrong: {done}")
    print(json.dumps({"first_pack": first[0], "embedding": done.seconds}))
    end_now(0)  # as the command does


if __name__ == "__main__":
    main()
