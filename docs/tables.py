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
    return "\n".join(aligned([NATIVE_COLUMNS, *map(native_row, reports)])) + "\n"


def native_row(report: dict[str, Any]) -> tuple[str, ...]:
    """Return a batch's cells; what was not measured stays empty."""
    (work,) = report["workloads"]
    best, results = work["headline"], work["results"]
    peer, ours = results[best["peer"]], results.get(best.get("ours"))
    eights = [one["images_per_second"] for title, one in results.items() if "fp8" in title]
    mine: tuple[str, ...] = ("", "", "", "")
    if ours:
        mine = (
            best["ours"].removeprefix("packvit, "),
            f"{ours['images_per_second']:,.0f}",
            spread(best["times_faster"]),
            f"{ours['fraction_of_ceiling']:.2f}",
        )
    return (
        f"{report['row']}, {work['images']} images",
        best["peer"],
        f"{peer['images_per_second']:,.0f}",
        *mine,
        f"{max(eights):,.0f}" if eights else "",
        f"{max(eights) / ours['images_per_second']:.2f}" if eights and ours else "",
        f"{report['gpus']}, {report['commit']}, {report['date']}",
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
