"""Draw README's chart: images a second, packvit beside its peers, from benchmarks/results.

python -m demo.chart docs/pictures/speed.png
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from docs.generate import newest

TITLES = {
    "bench-aimv2-large": "AIMv2-large, inference",
    "bench-aimv2-large-train": "AIMv2-large, training step",
    "bench-siglip2-so400m": "SigLIP2-so400m, inference",
    "bench-siglip2-so400m-train": "SigLIP2-so400m, training step",
}
OURS, PEER, TEXT = "#1f6feb", "#b8bfc7", "#24292f"


def bars(report: dict[str, Any]) -> tuple[list[str], list[float], float]:
    """Return names, images a second and our ratio to the strongest peer, on the mix of sizes.

    Ours is the report's headline: the fastest contender whose tokens equal the reference's.
    """
    [load] = [load for load in report["workloads"] if load["name"] == "mixed"]
    found = load["results"]
    peers = {name: one for name, one in found.items() if not one["ours"]}
    ranked = sorted(peers, key=lambda name: peers[name]["median_ms"])
    names = [load["headline"]["ours"], *ranked]
    rates = [load["images"] / found[name]["median_ms"] * 1000 for name in names]
    return ["packvit", *ranked], rates, load["headline"]["times_faster"][1]


def draw(axis: Any, title: str, report: dict[str, Any], slots: int) -> None:
    """Draw one panel with room for so many bars."""
    names, rates, ratio = bars(report)
    places = range(len(names))
    axis.barh(places, rates, color=[OURS, *[PEER] * (len(names) - 1)], height=0.76)
    axis.set_yticks(places, names, fontsize=9, color=TEXT)
    axis.get_yticklabels()[0].set_fontweight("bold")
    axis.set_ylim(slots - 0.5, -0.6)
    for place, rate in zip(places, rates, strict=True):
        weight = "normal" if place else "bold"
        left = rate + max(rates) * 0.015
        axis.text(left, place, f"{rate:,.0f}", va="center", fontsize=9, weight=weight, color=TEXT)
    axis.set_xlim(0, max(rates) * 1.14)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    words = f"{ratio:.2f} times as fast as the best peer"
    axis.text(max(rates) * 0.03, 0, words, va="center", fontsize=9, weight="bold", color="white")
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT)


def caption(report: dict[str, Any]) -> str:
    """Return what was measured, where and when."""
    [load] = [load for load in report["workloads"] if load["name"] == "mixed"]
    sizes = f"{load['images']} images of {load['fewest']} to {load['most']:,} patches"
    return (
        f"Images a second: {sizes}, {report['dtype']}, one {report['gpus']}, {report['date']}; "
        "medians, and median ratios of rounds.\n"
        f"torch {report['torch']}, transformers {report['transformers']}, timm {report['timm']}. "
        "No peer was compiled in the training steps. timm cannot express AIMv2."
    )


def main() -> None:
    """Draw all panels on one sheet."""
    reports = [newest(name) for name in TITLES]
    slots = [len(bars(report)[0]) for report in reports if report]
    rows = [max(slots[:2]), max(slots[2:])]
    figure, axes = plt.subplots(2, 2, figsize=(11, 4.6), height_ratios=rows)
    figure.set_layout_engine("constrained", hspace=0.06, wspace=0.04)
    for index, (axis, title) in enumerate(zip(axes.flat, TITLES.values(), strict=True)):
        report = reports[index]
        assert report
        draw(axis, title, report, rows[index // 2])
    assert reports[0]
    figure.supxlabel(caption(reports[0]), fontsize=8.5, color="#57606a", x=0.01, ha="left")
    figure.savefig(Path(sys.argv[1]), dpi=140)


if __name__ == "__main__":
    main()
