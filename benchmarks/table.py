"""Print a benchmark's JSON as a Markdown table.

python -m benchmarks.table benchmarks/results/forward-h200.json
"""

import json
import sys
from pathlib import Path
from typing import Any


def table(report: dict[str, Any]) -> str:
    """Return contenders by speed, as times the baseline and as a share of the ceiling."""
    load = report["workload"]
    lines = [
        f"{report['gpus'] if report['gpus'] != 'none' else report['system']}, "
        f"torch {report['torch']}, transformers {report['transformers']}, {report['date']}: "
        f"{load['images']} images, {load['tokens']:,} tokens, {load['dtype']}",
        "",
        "| way | times the baseline (quartiles) | share of the matmul rate | peak GiB |",
        "|---|---|---|---|",
    ]
    entries = report["results"].items()
    for name, entry in sorted(entries, key=lambda item: item[1]["median_ms"]):
        if "tflops" in entry:
            lines.append(f"| {name}: {entry['tflops']:.0f} TFLOP/s | | 1 | |")
            continue
        low, middle, high = entry["times_faster_than_baseline"]
        ratio = (
            "1 (baseline)" if name == report["baseline"] else f"{middle:.2f} ({low:.2f}-{high:.2f})"
        )
        share = entry.get("fraction_of_ceiling")
        peak = entry.get("peak_gib")
        lines.append(
            f"| {name} | {ratio} | {f'{share:.2f}' if share else ''} | "
            f"{f'{peak:.1f}' if peak else ''} |"
        )
    missing = report.get("missing")
    return "\n".join(lines) + (f"\n\nMissing here: {', '.join(missing)}." if missing else "") + "\n"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
