"""What is lost when a cluster's machines go: a Ray job in an object store, killed again and again.

The photographs and the encoder of `benchmarks.scaling`. A local server stands for the store (moto),
two Ray nodes on this host for two machines, each with a GPU, or with a CPU where there is none. At
moments drawn by `--seed`, in commits, an actor is killed (`--kills` times), the second node is lost
with all its processes and another one joins, and the process that runs the job is killed, and
resumed by the same command. The parts must be byte for byte those of an undisturbed job of one
process. Before that, Ray's rate is measured beside that of a process for each device, both
undisturbed and into the store: "steady" is from a fifth of the rows to nine tenths.

    python -m benchmarks.spot --images 8000 > benchmarks/results/spot-h200.json
    python -m benchmarks.spot --model tiny --images 640    # whether it runs, on a CPU
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.bulk import command
from benchmarks.bulk_jobs import MARK, marked
from benchmarks.scaling import finish, run, start
from packvit.bench.measuring import gpu_state, where
from packvit.corpus.folder.stores import StorePath, find_folder

BUCKET = "s3://spot"
NODES = 2
SECONDS = 240.0  # in which the next commit comes, or never


def main() -> None:
    """Print one JSON object with the machine, the workload and the results."""
    parser = argparse.ArgumentParser(description="A Ray job on machines that go away.")
    parser.add_argument("--model", choices=["aimv2-large", "tiny"], default="aimv2-large")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--distinct", type=int, default=512)
    parser.add_argument("--max-patches", type=int, default=650)
    parser.add_argument("--kills", type=int, default=3, help="of actors")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    # A node that is lost is missed after 3 seconds instead of 15, so that this takes less long.
    os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    with TemporaryDirectory(prefix="spot-") as scratch, serving(Path(scratch)):
        report = measure(asked, Path(scratch))
    json.dump(where() | report, sys.stdout, indent=2)
    print()


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the report."""
    import torch

    from benchmarks.feeding import build, say, write_photographs

    has_gpus = torch.cuda.is_available()
    photos, model = scratch / "photos", scratch / "model"
    write_photographs(photos, asked.images, min(asked.distinct, asked.images))
    build(asked.model, torch.device("cuda" if has_gpus else "cpu")).save_pretrained(model)
    torch.cuda.empty_cache()
    common = {"photos": str(photos), "model": str(model), "max_patches": asked.max_patches}
    common |= {"kind": "gpu" if has_gpus else "pil", "processes": NODES, "ray": None}
    rates: dict[str, dict[str, Any]] = {}
    for name, ray in (("processes", None), ("ray", "local")):
        words = common | {"out": f"{BUCKET}/{name}", "ray": ray}
        rates[name] = run(words)
        say(f"{name}: {rates[name]['steady_images_per_second']:,.0f} images/s")
    one = common | {"out": str(scratch / "one"), "processes": 1}
    parts = len(rates["processes"]["parts"])
    moments = draw_moments(random.Random(asked.seed), parts, asked.kills)
    disturbed = disturb(common | {"out": f"{BUCKET}/disturbed"}, one, moments, has_gpus)
    wanted = contents(scratch / "one")
    same = {name: contents(find_folder(f"{BUCKET}/{name}")) == wanted for name in rates}
    same["disturbed"] = contents(find_folder(f"{BUCKET}/disturbed")) == wanted
    fast, ours = (rates[name]["steady_images_per_second"] for name in ("ray", "processes"))
    return {
        "gpu_state": gpu_state(),
        "cpus": len(os.sched_getaffinity(0)),
        "workload": vars(asked) | {"parts": parts},
        "rates": {
            name: {key: value for key, value in rate.items() if key != "parts"}
            for name, rate in rates.items()
        },
        "disturbed": disturbed,
        "results": {"ray's steady rate, of the processes'": fast / ours, "same bytes": same},
    }


def draw_moments(draw: random.Random, parts: int, kills: int) -> list[tuple[int, str]]:
    """Return what happens after how many commits, in order."""
    what = ["actor killed"] * kills + ["node lost", "job killed"]
    draw.shuffle(what)
    return list(zip(sorted(draw.sample(range(1, parts - 1), len(what))), what, strict=True))


def disturb(
    words: dict[str, Any],
    one: dict[str, Any],
    moments: Sequence[tuple[int, str]],
    has_gpus: bool,
) -> dict[str, Any]:
    """Run a job on a cluster of two nodes, all of `moments` with it; return what happened.

    The undisturbed job of `one` process runs while the killed job's lease expires.
    """
    from ray.cluster_utils import Cluster

    cpus = max(1, len(os.sched_getaffinity(0)) // NODES)

    def describe_node(place: int) -> dict[str, Any]:
        device = {"env_vars": {"CUDA_VISIBLE_DEVICES": str(place)}} if has_gpus else {}
        own = {"num_gpus": 1, "num_cpus": cpus} if has_gpus else {"num_gpus": 0, "num_cpus": 1}
        return device | own | {"include_dashboard": False}

    cluster = Cluster(initialize_head=True, head_node_args=describe_node(0))
    other = cluster.add_node(**describe_node(1))
    words = words | {"ray": cluster.address}
    folder = find_folder(words["out"])
    happened: list[dict[str, Any]] = []
    start_time, draw = time.monotonic(), random.Random(len(moments))
    job = start(words)
    for commits, what in moments:
        await_commits(folder, commits, job)
        happened.append({"what": what, "seconds": time.monotonic() - start_time})
        happened[-1]["commits"] = count_commits(folder)
        if what == "actor killed":
            kill(draw.choice(await_actors()))
        elif what == "node lost":
            for process in descendants(other.all_processes["raylet"][0].process.pid):
                kill(process)
            cluster.remove_node(other, allow_graceful=False)
            other = cluster.add_node(**describe_node(1))
        else:
            job.kill()
            job.wait()
            job = start(words)
            undisturbed = finish(start(one))
            happened[-1]["of one process"] = undisturbed["steady_images_per_second"]
        print(happened[-1], file=sys.stderr, flush=True)
    done = finish(job)
    seconds = time.monotonic() - start_time
    cluster.shutdown()
    return {"seconds": seconds, "errors": done["errors"], "happened": happened}


def count_commits(folder: Any) -> int:
    """Return how many parts are committed."""
    return sum(1 for _ in (folder / "_commits").iterdir())


def await_commits(folder: Any, count: int, job: subprocess.Popen[str]) -> None:
    """Wait until so many parts are committed.

    Raises: SystemExit if the job ends before, or hangs.
    """
    deadline = time.monotonic() + SECONDS
    while (found := count_commits(folder)) < count:
        if job.poll() is not None:
            raise SystemExit(f"The job ended after {found} commits: {finish(job)}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{found} commits after {SECONDS:.0f} s, {count} were awaited.")
        time.sleep(0.1)


def await_actors() -> list[int]:
    """Return the actors that are there, once there is one."""
    while True:
        found = [each for each in marked(os.environ[MARK]) if is_actor(each)]
        if found:
            return sorted(found)
        time.sleep(0.05)


def is_actor(process: int) -> bool:
    """Return whether a process is an actor of Ray Data."""
    return command(process).startswith(b"ray::MapWorker")


def kill(process: int) -> None:
    """Kill a process, unless it has ended."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def descendants(process: int) -> list[int]:
    """Return a process, and those that it and they started."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [
                each for child in task.read_text().split() for each in descendants(int(child))
            ]
        except OSError:  # it has ended
            continue
    return found


def contents(folder: Path | StorePath) -> dict[str, bytes]:
    """Return the bytes of all parts."""
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


@contextmanager
def serving(scratch: Path) -> Iterator[None]:
    """Run a store on this host, with a bucket; the environment says how to reach it."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (scratch / "store.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
        )
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "spot"}
    os.environ |= {"AWS_SECRET_ACCESS_KEY": "spot", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        fsspec.filesystem("s3").mkdir(BUCKET.removeprefix("s3://"))
        yield
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
