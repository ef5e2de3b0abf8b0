"""Photographs to vectors in bulk: packvit's job beside Ray Data, Daft, datasets.map and `encode`.

The same JPEGs and the same CLIP with random weights: `large` is ViT-L/14, `small` ViT-B/32, `drawn`
two layers, for what becomes of faults. A job is a process of its own (`bulk_jobs.py`) and runs
twice a round, over few photographs and over many, so that what it takes to start is subtracted:

    images/s = (many - few) / (seconds of many - seconds of few)

A job whose difference is below five seconds does 16 times as many, since its start varies too.
CPU seconds are those of all its processes; where others use the machine, they are the fairer
measure. Faults: the rows that are readable afterwards if a worker process is killed once the job
has written some rows, or at three quarters of its time; if the job is; and if some files are
broken. A peer that is not installed is named as missing.

python -m benchmarks.bulk small > benchmarks/results/bulk-small-cpu.json
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.bulk_jobs import CPUS, JOBS, MARK, cpu_seconds, marked, on_gpu
from packvit.bench.measuring import where

MODULES = {
    "packvit": "packvit",
    "packvit --processes": "packvit",
    "packvit --decode gpu": "packvit",
    "Ray Data": "ray",
    "Daft": "daft",
    "datasets.map": "datasets",
    "sentence-transformers": "sentence_transformers",
}
SHAPES: dict[str, dict[str, int]] = {  # of CLIPVisionConfig
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"intermediate_size": 4096, "patch_size": 14},
    "small": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"intermediate_size": 3072, "patch_size": 32},
    "drawn": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 128, "patch_size": 32},
}
SIDES = ((640, 480), (480, 640), (1024, 768), (800, 800))
BROKEN = {
    "empty.jpg": b"",
    "page.jpg": b"<html>404 not found</html>",
    "zeros.jpg": bytes(20_000),
}
SECONDS = 900.0  # after which a job counts as hung
SHORT, MORE = 5.0, 16  # seconds of a difference that is too short, and times as many photographs
DISTINCT = 256


def write_photographs(folder: Path, count: int) -> Path:
    """Write JPEGs of slopes and noise, of four sizes, some again and again; return the folder."""
    folder.mkdir()

    def write(number: int) -> None:
        width, height = SIDES[number % len(SIDES)]
        rows, columns = np.mgrid[0:height, 0:width]
        slopes = np.stack([rows, columns, rows + columns], axis=2) * 200 // (height + width)
        noise = np.random.default_rng(number).integers(0, 40, slopes.shape)
        Image.fromarray((slopes + noise).astype(np.uint8)).save(folder / f"{number:06d}.jpg")

    with ThreadPoolExecutor(CPUS) as writers:
        list(writers.map(write, range(min(count, DISTINCT))))
    for number in range(DISTINCT, count):
        os.link(folder / f"{number % DISTINCT:06d}.jpg", folder / f"{number:06d}.jpg")
    return folder


def write_model(folder: Path, size: str) -> Path:
    """Write CLIP with random weights as transformers does, with a small tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1}
    width = SHAPES[size]["hidden_size"] * 3 // 4
    config = CLIPConfig(
        text_config=text | {"pad_token_id": 1, "projection_dim": width},
        vision_config={"image_size": 224, "projection_dim": width, **SHAPES[size]},
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(folder)
    return folder


class Job:
    """A running job of one contender."""

    def __init__(self, name: str, photos: Path, model: Path, out: Path) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.out = out
        # What one's own settings for threads and caches would change.
        env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        env |= {MARK: self.mark, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bulk_jobs", name, str(photos), str(model), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.spent: dict[int, float] = {}  # CPU seconds by process, when it was last seen
        self.watching = Thread(target=self.watch, daemon=True)
        self.watching.start()

    def watch(self) -> None:
        """Note the CPU time of all processes of the job until it ends.

        Some, as Ray's, end long before it does, and nobody waits for them.
        """
        while self.process.poll() is None:
            for process in marked(self.mark):
                self.spent[process] = cpu_seconds(process) or self.spent.get(process, 0.0)
            time.sleep(0.2)

    def finish(self) -> dict[str, Any]:
        """Return what the job printed, and the rows it left; kill all that it leaves behind."""
        try:
            said, remarks = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, remarks = self.process.communicate()
            remarks += f"\nhung for {SECONDS:.0f} s"
        for process in marked(self.mark):
            os.kill(process, signal.SIGKILL)
        found: dict[str, Any] = count_rows(self.out) | {"exit_code": self.process.returncode}
        if self.process.returncode:
            lines = [line for line in remarks.splitlines() if line.strip()]
            return found | {"error": lines[-1][:200] if lines else ""}
        self.watching.join()
        spent = {"cpu_seconds": sum(self.spent.values())}
        own = [line for line in said.splitlines() if line.startswith("{")]  # Ray prints more
        return found | spent | json.loads(own[-1])

    def await_rows(self, seconds: float) -> None:
        """Wait until the job has written some rows, or for so many seconds."""
        end = time.monotonic() + seconds
        while (
            time.monotonic() < end
            and self.process.poll() is None
            and not count_rows(self.out)["rows"]
        ):
            time.sleep(0.05)

    def kill_worker(self) -> bool:
        """Kill the process, other than the first, that has used the most CPU time; say if any."""
        workers = [each for each in marked(self.mark) if each != self.process.pid]
        names = {each: command(each) for each in workers}
        if any(name.startswith(b"ray::") for name in names.values()):  # the others are its servers
            workers = [each for each in workers if names[each].startswith(b"ray::")]
        if not workers:
            return False
        os.kill(max(workers, key=cpu_seconds), signal.SIGKILL)
        return True


def command(process: int) -> bytes:
    """Return a process's command line."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def count_rows(out: Path) -> dict[str, int]:
    """Return the rows of a job's readable Parquet files, and those with a vector.

    A row without one counts where it says why, as packvit's do.
    """
    rows = vectors = 0
    for path in out.rglob("*.parquet"):
        try:
            found = pq.ParquetFile(path)
            ours = "status" in found.schema_arrow.names
            column = found.read(["pooled" if ours else "vector"]).column(0)
        except (pa.ArrowException, OSError):  # half written, or renamed meanwhile
            continue
        vectors += len(column) - column.null_count
        rows += len(column) - (0 if ours else column.null_count)
    return {"rows": rows, "vectors": vectors}


def measure_speed(
    scratch: Path, names: list[str], model: Path, few: int, many: int, rounds: int
) -> dict[str, Any]:
    """Return the rate of each contender."""
    counts = (few, many, MORE * many)
    folders = {count: write_photographs(scratch / str(count), count) for count in counts}
    taken: dict[str, list[dict[int, dict[str, Any]]]] = {name: [] for name in names}
    shuffle, number = random.Random(0), 0
    for _ in range(rounds):
        for name in shuffle.sample(names, len(names)):
            runs: dict[int, dict[str, Any]] = {}
            for count in counts:
                if count > many and not is_short(runs[few], runs[many]):
                    break
                number += 1
                runs[count] = Job(name, folders[count], model, scratch / f"out-{number}").finish()
                print(name, count, runs[count], file=sys.stderr)
            taken[name].append(runs)
    return {name: describe_runs(runs, few) for name, runs in taken.items()}


def is_short(few: dict[str, Any], many: dict[str, Any]) -> bool:
    """Return whether two runs that worked differ by too short a time."""
    return "seconds" in few and "seconds" in many and many["seconds"] - few["seconds"] < SHORT


def describe_runs(rounds: list[dict[int, dict[str, Any]]], few: int) -> dict[str, Any]:
    """Return the medians of a contender's rounds, or its error."""
    for each in rounds:
        for count, run in each.items():
            if run["exit_code"] or run["rows"] != count:
                return {"error": run.get("error", f"{run['rows']} of {count} rows")}
    taken = [(max(each) - few, each[few], each[max(each)]) for each in rounds]

    def spent(field: str) -> float:
        return statistics.median((long[field] - short[field]) / n for n, short, long in taken)

    return {
        "images_per_second": 1 / spent("seconds"),
        "cpu_seconds_per_image": spent("cpu_seconds"),
        "photographs": max(rounds[0]),
        "whole_seconds": statistics.median(long["seconds"] for _, _, long in taken),
        "start_seconds": statistics.median(short["seconds"] for _, short, _ in taken),
    }


def measure_faults(scratch: Path, names: list[str], model: Path, count: int) -> dict[str, Any]:
    """Return the rows that each contender leaves in the presence of faults."""
    photos = write_photographs(scratch / "photos", count)
    broken = write_photographs(scratch / "broken", count)
    cut = (broken / "000000.jpg").read_bytes()
    for name, data in {**BROKEN, "cut.jpg": cut[: len(cut) // 2]}.items():
        (broken / name).write_bytes(data)
    results = {}
    for name in names:
        whole = Job(name, photos, model, scratch / f"{name}-whole").finish()
        print(name, whole, file=sys.stderr)
        if whole["exit_code"]:
            results[name] = {"error": whole["error"]}
            continue
        found = {"broken files": Job(name, broken, model, scratch / f"{name}-broken").finish()}
        for what in ("worker killed", "job killed"):
            job = Job(name, photos, model, scratch / f"{name}-{what}")
            job.await_rows(0.75 * whole["seconds"])
            if what == "job killed":
                for process in marked(job.mark):
                    os.kill(process, signal.SIGKILL)
            elif not job.kill_worker():
                job.process.kill()  # it has no others
            found[what] = job.finish()
        print(name, found, file=sys.stderr)
        results[name] = {"seconds": whole["seconds"], **found}
    return results


@click.command()
@click.argument("what", type=click.Choice(["small", "large", "faults"]))
@click.option("--few", default=8, help="Photographs of the short run.")
@click.option("--many", type=int, help="Photographs of the long run.")
@click.option("--rounds", default=1)
@click.option("--only", multiple=True, type=click.Choice([*JOBS]), help="These contenders alone.")
def main(what: str, few: int, many: int | None, rounds: int, only: tuple[str, ...]) -> None:
    """Print one JSON object with the machine and the results."""
    usable = [name for name in JOBS if on_gpu() or name != "packvit --decode gpu"]
    names = [name for name in only or usable if find_spec(MODULES[name])]
    missing = [name for name in usable if name not in names and not only]
    size = "drawn" if what == "faults" else what
    many = many or {"small": 264, "large": 24, "faults": 512}[what]
    load = os.getloadavg()[0]
    with TemporaryDirectory(prefix="bulk-") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model", size)
        if what == "faults":
            results = measure_faults(scratch, names, model, many)
        else:
            results = measure_speed(scratch, names, model, few, many, rounds)
    workload = {
        "encoder": size,
        "few": few,
        "many": many,
        "rounds": rounds,
        "broken": len(BROKEN) + 1,
    }
    about = {"cpus": CPUS, "load_before": load, "torchvision": find_spec("torchvision") is not None}
    report = where() | about | {"workload": workload, "missing": missing, "results": results}
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
