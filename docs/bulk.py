"""The tables of `benchmarks.bulk`: packvit's job beside those of other libraries."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ENCODERS = {"small": "CLIP ViT-B/32", "large": "CLIP ViT-L/14", "drawn": "CLIP of two layers"}
OURS = "packvit"


def bulk_tables() -> str:
    """Return a table for each recorded run, with its machine and how busy that was."""
    found = []
    for path in sorted(RESULTS.glob("bulk-*.json")):
        report = json.loads(path.read_text())
        faults = report["workload"]["encoder"] == "drawn"
        found.append(faults_table(report) if faults else speed_table(report))
    return "\n".join(found) if found else "No run is recorded yet.\n"


def describe(report: dict[str, Any]) -> str:
    """Return one paragraph on what was run, and where."""
    work = report["workload"]
    where = report["gpus"] if report["gpus"] != "none" else f"{report['cpus']} CPUs"
    missing = f"; not installed: {', '.join(report['missing'])}" if report["missing"] else ""
    vision = "" if report["torchvision"] else ", peers without torchvision"
    return (
        f"{ENCODERS[work['encoder']]}, {work['many']} JPEGs, {where} at a load of "
        f"{report['load_before']:.0f}{vision}; {report['date']}{missing}.\n"
    )


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed_table(report: dict[str, Any]) -> str:
    """Return how fast each job was, and ours beside the best other."""
    rows = []
    for name, found in report["results"].items():
        if "error" in found:
            rows.append((name, "failed", "", ""))
            continue
        rate, spent = found["images_per_second"], found["cpu_seconds_per_image"]
        rows.append((name, f"{rate:.2f}", f"{spent:.3f}", f"{found['start_seconds']:.0f} s"))
    words = compare(report, "cpu_seconds_per_image", "By CPU seconds")
    if report["load_before"] > report["cpus"]:
        words += "The machine was busy, so rates cannot be compared.\n\n"
    else:
        words = compare(report, "images_per_second", "By images a second") + words
    head = ("job", "images/s", "CPU seconds an image", "few photographs, start and end")
    return f"{describe(report)}\n{words}{as_table(head, rows)}"


def compare(report: dict[str, Any], field: str, by: str) -> str:
    """Return how many times as fast the better of our jobs is as the best other."""
    fast: dict[bool, list[float]] = {True: [], False: []}
    for name, found in report["results"].items():
        if "error" not in found:
            value = found[field] if field == "images_per_second" else 1 / found[field]
            fast[name.startswith(OURS)].append(value)
    if not all(fast.values()):
        return ""
    return f"{by}, packvit is {max(fast[True]) / max(fast[False]):.2f} times the best other.\n\n"


def faults_table(report: dict[str, Any]) -> str:
    """Return the rows that are there after faults."""
    many, broken = report["workload"]["many"], report["workload"]["broken"]
    kinds = ("worker killed", "job killed", "broken files")
    rows = []
    for name, found in report["results"].items():
        cells = ["failed"] * 3 if "error" in found else [there(found[kind]) for kind in kinds]
        rows.append((name, *cells))
    head = ("job", f"a worker killed: rows of {many}", f"the job killed: rows of {many}")
    return f"{describe(report)}\n" + as_table(
        (*head, f"{broken} broken files: rows of {many + broken}"), rows
    )


def there(found: dict[str, Any]) -> str:
    """Return how many rows a job left, and whether it ended by itself."""
    vectors = found.get("vectors", found["rows"])
    some = "" if vectors == found["rows"] else f" ({vectors} vectors)"
    return f"{found['rows']}{some}" + (", job failed" if found["exit_code"] not in (0, -9) else "")
