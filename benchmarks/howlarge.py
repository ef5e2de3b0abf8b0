"""What a job of a given size takes: machines, hours, money, bytes, objects, time to resume.

Each figure is computed from a measured one, which its line names. `--measure` measures those that
are a CPU's, in CPU seconds, and prints the JSON that is kept as `results/howlarge-cpu.json`.

python -m benchmarks.howlarge --images 1e9 --gpus 64 --price 2.50
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from packvit.corpus.folder.sizes import in_units

RESULTS = Path(__file__).parent / "results"
FEEDING, SCALING, SIZES = "feeding-h100.json", "scaling-h200.json", "howlarge-cpu.json"
ROWS = 1024  # of a part, on a GPU or of a shard
WIDTH = 1024  # of the vectors that are measured and estimated: AIMv2-large's
START = 6.8  # seconds of a warm start on a GPU until its first pack: LOG.md, start-up
LISTED = 200_000  # inputs, when it is measured
PARTS = 16  # of a folder that is resumed


def read(name: str) -> Any:
    """Return a recorded result."""
    return json.loads((RESULTS / name).read_text())


def estimate(
    images: float, gpus: int, per_machine: int, price: float
) -> list[tuple[str, str, str]]:
    """Return lines of (what, how much, from what), for AIMv2-large with one vector an image.

    Units: `price` is that of a GPU and hour, in any currency.
    """
    fed, scaled, sizes = read(FEEDING), read(SCALING), read(SIZES)
    rate = fed["results"]["job, gpu"]["images_per_second"]
    together = scaled["results"]["2 GPUs, gpu, processes"]["steady"] / 2 if per_machine > 1 else 1.0
    machines = math.ceil(gpus / per_machine)
    encoding = images / (rate * together * gpus)
    listing = images * sizes["list_seconds_each"]
    checking = images / machines * sizes["resume_seconds_each"]
    hours = (encoding + listing) / 3600
    parts = math.ceil(images / ROWS)
    row, exported = sizes["row_bytes"], 4 * WIDTH
    patches = fed["workload"]["patches_each"]
    speed = (
        f"`{FEEDING}`: {rate:,.0f} images/s a GPU from JPEGs to parts, {patches:.0f} patches each"
    )
    shared = (
        f"`{SCALING}`: two GPUs of a host do {2 * together:.2f} times as much, more not measured"
    )
    read_bytes = images * fed["workload"]["bytes_each"]
    listed = (
        f"`{SIZES}`: {1e6 * sizes['list_seconds_each']:.1f} µs an input, and on every machine all"
    )
    return [
        ("machines", f"{machines:,} with {min(gpus, per_machine)} GPUs each", "as asked"),
        ("hours of embedding", f"{encoding / 3600:,.2f}", f"{speed}; {shared}"),
        ("hours of listing before", f"{listing / 3600:,.2f}", listed),
        ("GPU-hours", f"{hours * gpus:,.0f}", "both, on all GPUs"),
        (
            "money",
            f"{hours * gpus * price:,.0f}",
            f"at {price:g} for a GPU and hour, storage beside",
        ),
        (
            "bytes read",
            in_units(read_bytes),
            f"`{FEEDING}`: {fed['workload']['bytes_each']:,} each",
        ),
        (
            "bytes written",
            in_units(images * row),
            f"`{SIZES}`: {row:,.0f} a row of {WIDTH} float32",
        ),
        ("of an export beside", in_units(images * exported), "--format npy: 4 bytes a number"),
        ("objects in a bucket", f"{2 * parts:,}", f"a part and a commit for each {ROWS:,} rows"),
        (
            "disk for the list, a machine",
            in_units(images * sizes["list_bytes_each"]),
            f"`{SIZES}`: {sizes['list_bytes_each']:.0f} bytes an input in TMPDIR",
        ),
        (
            "lost by a kill, a GPU",
            f"{ROWS / rate + START:,.1f} s",
            f"a part of {ROWS:,} rows, and {START:g} s to start (LOG.md, warm)",
        ),
        (
            "hours to resume at the end",
            f"{(listing + checking) / 3600:,.2f}",
            f"`{SIZES}`: listing again, and {1e6 * sizes['resume_seconds_each']:.1f} µs of a CPU "
            "for each row that is written, from memory",
        ),
    ]


def as_text(lines: Iterable[tuple[str, str, str]]) -> str:
    """Return lines as text: what, how much, and from what in a line below."""
    return "".join(f"{what:<29}{much}\n{'':<29}  {source}\n" for what, much, source in lines)


def as_markdown(lines: Iterable[tuple[str, str, str]]) -> str:
    """Return lines as a table."""
    rows = [f"| {what} | {much} | {source} |" for what, much, source in lines]
    return "\n".join(["| what | how much | from |", "|---|---|---|", *rows]) + "\n"


def measure() -> dict[str, Any]:
    """Return the figures of a CPU: listing, the bytes of a row, checking what is written."""
    from benchmarks.drawn import drawn_rows, write_folder
    from packvit.bench.measuring import where
    from packvit.corpus.folder.resume import keep, read_rows
    from packvit.corpus.folder.rows import Row
    from packvit.corpus.inputs.find import list_inputs

    with TemporaryDirectory() as scratch:
        listed = Path(scratch) / "list.txt"
        with listed.open("w") as file:
            for number in range(LISTED):
                file.write(f"https://photographs.example/{number // 1000:05d}/{number:09d}.jpg\n")
        start = time.process_time()
        listing = list_inputs([], [str(listed)])
        listing_seconds = (time.process_time() - start) / LISTED
        pages, size = (
            listing.rows.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "page_size")
        )
        temporary = listing.rows.execute("PRAGMA temp.page_count").fetchone()[0]
        draw = np.random.default_rng(0)

        def drawn(part: int) -> list[Row]:
            rows = drawn_rows(part * ROWS, (part + 1) * ROWS)
            return [replace(row, sha256=draw.bytes(32).hex()) for row in rows]

        blocks = ((drawn(n), draw.standard_normal((ROWS, WIDTH), np.float32)) for n in range(PARTS))
        folder = write_folder(Path(scratch) / "features", blocks, WIDTH)
        written = sum(path.stat().st_size for path in (folder / "data").iterdir())
        start = time.process_time()
        kept, notes = keep(folder, PARTS * ROWS, ROWS)
        for entry in kept.values():
            read_rows(folder, entry)
        resuming = (time.process_time() - start) / (PARTS * ROWS)
        assert len(kept) == PARTS
        assert not notes
    return where() | {
        "load": os.getloadavg()[0],
        "list_seconds_each": listing_seconds,
        "list_bytes_each": (pages + temporary) * size / LISTED,
        "row_bytes": written / (PARTS * ROWS),
        "resume_seconds_each": resuming,
    }


@click.command()
@click.option("--images", default=1e9, help="How many photographs.")
@click.option("--gpus", default=64, help="How many GPUs in all.")
@click.option("--gpus-per-machine", "per_machine", default=8)
@click.option("--price", default=2.5, help="Of one GPU for one hour.")
@click.option("--measure", "measuring", is_flag=True, help="Print measured figures of this CPU.")
def main(images: float, gpus: int, per_machine: int, price: float, *, measuring: bool) -> None:
    """Print what embedding so many photographs takes."""
    if measuring:
        json.dump(measure(), sys.stdout, indent=2)
        print()
        return
    print(as_text(estimate(images, gpus, per_machine, price)), end="")


if __name__ == "__main__":
    main()
