"""Format a report as Markdown tables, for the terminal and the docs. No torch."""

from collections.abc import Collection, Sequence
from typing import Any

COLUMNS = (
    "way",
    "ms",
    "times the baseline (quartiles)",
    "share of the matmul rate",
    "peak GiB",
    "off by",
)


def as_markdown(report: dict[str, Any]) -> str:
    """Return all workloads of a report: contenders by speed, wrong ones, missing ones."""
    everywhere = set.intersection(*(set(work["missing"].items()) for work in report["workloads"]))
    first = report["workloads"][0]["missing"]
    common = listed("Missing here", [item for item in first.items() if item in everywhere])
    sections = (section(report, work, everywhere) for work in report["workloads"])
    return "\n".join([machine(report), *sections, *common, *accuracy(report)])


def machine(report: dict[str, Any]) -> str:
    """Return a description of the model and the machine."""
    on_gpu = report["device"] == "cuda"
    place = report["gpus"] if on_gpu else f"CPU, {report['threads']} threads"
    if report.get("clock") == "cpu":
        place += ", in CPU time"
    return (
        f"{report['model']} ({report['layers']} layers, weights {report['weights']}), "
        f"{report['pass']}, {report['dtype']}, on {place}; torch {report['torch']}, "
        f"transformers {report['transformers']}, timm {report['timm']}, {report['date']}.\n"
    )


def accuracy(report: dict[str, Any]) -> list[str]:
    """Return the accuracy of bf16 and fp8, if it was measured."""
    found = report.get("fp8_accuracy")
    if not found:
        return []
    rows = [
        (one["weights"], *(f"{near['mean']:.5f} ({near['least']:.4f})" for near in both))
        for one in found
        for both in [(one["bf16"], one["fp8"])]
    ]
    head = ("weights", "bf16", "fp8")
    title = "Cosine of a token with float32's, mean (least); no published weights were measured:"
    return [title, "", *aligned([head, *rows]), ""]


def listed(title: str, missing: Sequence[tuple[str, str]]) -> list[str]:
    """Return the missing contenders, by reason."""
    by_reason: dict[str, list[str]] = {}
    for contender, reason in missing:
        by_reason.setdefault(reason, []).append(contender)
    lines = [f"- {'; '.join(titles)}: {reason}." for reason, titles in by_reason.items()]
    return [f"{title}:", "", *lines, ""] if lines else []


def section(
    report: dict[str, Any], work: dict[str, Any], everywhere: Collection[tuple[str, str]]
) -> str:
    """Return one workload's headline, its table, and what is missing only there."""
    sizes = f"{work['fewest']} to {work['most']}"
    if work["fewest"] == work["most"]:
        sizes = f"{work['most']}"
    smaller = ", scaled down from the GPU's" if work["scaled_down"] else ""
    lines = [
        f"**{work['title']}**: {work['images']:,} images of {sizes} patches, "
        f"{work['tokens']:,} tokens{smaller}, {work['tflop']:.3g} TFLOP; matmul rate "
        f"{work['ceiling_tflops']:.3g} TFLOP/s.",
        "",
    ]
    best = work["headline"]
    if best and "ours" in best:
        times = spread(best["times_faster"])
        lines += [f"{best['ours']} is {times} times {best['peer']}, the strongest peer.", ""]
    entries = sorted(work["results"].items(), key=lambda item: item[1]["median_ms"])
    rows = [row(title, entry, report["baseline"]) for title, entry in entries]
    lines += [*aligned([COLUMNS, *rows]), ""]
    if work["wrong"]:
        off = [f"{name} ({f['relative_difference']:.1e})" for name, f in work["wrong"].items()]
        lines += [f"WRONG, so not timed: {'; '.join(off)}.", ""]
    lines += listed("Missing", [item for item in work["missing"].items() if item not in everywhere])
    return "\n".join(lines)


def row(title: str, entry: dict[str, Any], baseline: str) -> tuple[str, ...]:
    """Return the cells of one contender."""
    times = entry["times_faster_than_baseline"]
    peak, off = entry.get("peak_gib"), entry.get("relative_difference")
    return (
        title,
        f"{entry['median_ms']:.4g}",
        "1 (baseline)" if title == baseline else spread(times),
        f"{entry['fraction_of_ceiling']:.2f}",
        "" if peak is None else f"{peak:.1f}",
        "" if off is None else f"{off:.0e}" if off else "0",
    )


def spread(quartiles: Sequence[float]) -> str:
    """Return a median with its quartiles."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns line up as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"
        for cells in rows
    ]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]
