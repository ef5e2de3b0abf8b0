"""The tables of the docs that are printed from the code, and from recorded runs."""

from collections.abc import Sequence
from typing import Any

from packvit.bench.table import aligned, spread
from packvit.families import FAMILIES
from packvit.model.attention import BACKENDS
from packvit.text.towers import TEXT_TOWERS

NATIVE_COLUMNS = (
    "batch",
    "strongest peer",
    "its images/s",
    "packvit",
    "images/s",
    "times the peer (quartiles)",
    "share of the matmul rate",
    "fp8, images/s",
    "fp8 over bf16",
    "measured",
)


def native_table(reports: Sequence[dict[str, Any]]) -> str:
    """Return one line for each batch at native size: the strongest peer, and our best beside it."""
    rows = (
        speed_row(f"{report['row']}, {work['images']} images", report, work)
        for report in reports
        for work in report["workloads"]
    )
    return "\n".join(aligned([NATIVE_COLUMNS, *rows])) + "\n"


def mixed_table(reports: Sequence[dict[str, Any]]) -> str:
    """Return one line for each model on mixed sizes: the strongest peer, and our best beside it."""
    rows = (
        speed_row(report["model"], report, work)
        for report in reports
        for work in report["workloads"]
        if work["name"] == "mixed"
    )
    return "\n".join(aligned([("model", *NATIVE_COLUMNS[1:]), *rows])) + "\n"


def speed_row(label: str, report: dict[str, Any], work: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a run; what was not measured stays empty."""
    best, results = work["headline"], work["results"]
    ours = results.get(best.get("ours"))
    rates = {title: 1e3 * work["images"] / one["median_ms"] for title, one in results.items()}
    eights = [rate for title, rate in rates.items() if "fp8" in title]
    mine: tuple[str, ...] = ("", "", "", "")
    if ours:
        mine = (
            best["ours"].removeprefix("packvit, "),
            f"{rates[best['ours']]:,.0f}",
            spread(best["times_faster"]),
            f"{ours['fraction_of_ceiling']:.2f}",
        )
    return (
        label,
        best["peer"],
        f"{rates[best['peer']]:,.0f}",
        *mine,
        f"{max(eights):,.0f}" if eights else "",
        f"{max(eights) / rates[best['ours']]:.2f}" if eights and ours else "",
        ", ".join(filter(None, (report["gpus"], report.get("commit"), report["date"]))),
    )


def backends_page() -> str:
    """Return the table of attention backends for the docs; it is the same on every machine."""
    lines = ["| name | what it calls | run and measured by us |", "|---|---|---|"]
    lines += [f"| `{b.name}` | {b.title} | {'yes' if b.measured else 'no'} |" for b in BACKENDS]
    return "\n".join(lines) + "\n"


def families_page() -> str:
    """Return the table of families for README."""
    lines = ["| family | class | layouts | published checkpoints |", "|---|---|---|---|"]
    for encoder in FAMILIES:
        family = encoder.family
        layouts = ", ".join(dict.fromkeys(layout.name for layout in family.layouts))
        some = f"{len(family.checkpoints)}, such as `{family.checkpoints[0]}`"
        lines.append(f"| {family.name} | `{encoder.__name__}` | {layouts} | {some} |")
    return "\n".join(lines) + "\n"


def text_page() -> str:
    """Return the table of text towers for the docs."""
    lines = ["| text tower | a text is | images' output in the same space | checkpoints |"]
    lines.append("|---|---|---|---|")
    for tower in TEXT_TOWERS:
        config, first = tower.read({}), tower.checkpoints[0]
        size = (
            f"{config.positions} tokens, filled up"
            if config.padded
            else f"up to {config.positions} tokens{', causal' if config.causal else ''}"
        )
        count = len(tower.checkpoints)
        some = f"`{first}`" if count == 1 else f"{count}, such as `{first}`"
        lines.append(f"| {tower.name} | {size} | `{tower.space}` | {some} |")
    return "\n".join(lines) + "\n"


def checkpoints_page() -> str:
    """Return docs/checkpoints.md: all published checkpoints that are known by name."""
    page = [
        "# Checkpoints\n",
        "Written by `docs/generate.py` from the families' files. No hub was in reach where packvit",
        "was built, so none of these was loaded from it.\n",
    ]
    for encoder in FAMILIES:
        page.append(f"## {encoder.family.name}: `{encoder.__name__}`\n")
        if elsewhere := encoder.family.reference.elsewhere:
            page.append(f"{elsewhere}\n")
        page += [f"- `{name}`" for name in encoder.family.checkpoints]
        page.append("")
    page.append("## Attention backends\n")
    return "\n".join([*page, backends_page()])
