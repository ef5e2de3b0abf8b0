"""What `packvit embed` prints of a job: one JSON object, or a table. No torch."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from packvit.cli.command import printable
from packvit.cli.progress import duration
from packvit.corpus.inputs.listing import by_suffix
from packvit.corpus.progress import Summary


def as_object(summary: Summary) -> dict[str, Any]:
    """Return the summary as JSON values."""
    return {
        "folder": summary.folder,
        "model": summary.model,
        "fingerprint": summary.fingerprint,
        "rows": summary.rows,
        "ok": summary.ok,
        "errors": {
            code: {"rows": count, "example": summary.examples[code]}
            for code, count in summary.errors.items()
        },
        "kept": summary.kept_rows,
        "reused": summary.reused,
        "ignored": summary.ignored,
        "passed_over": summary.passed_over,
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "images_per_second": summary.images_per_second,
        "tokens_per_second": summary.tokens_per_second,
        "shares": asdict(summary.shares),
        "slowest": summary.shares.slowest if summary.kept_rows < summary.rows else None,
        "halved": summary.halved,
        "on_gpu": summary.on_gpu,
    }


def as_table(summary: Summary) -> str:
    """Return the summary as a table."""
    bad = summary.rows - summary.ok
    rows = [("inputs", f"{summary.rows:,}"), ("ok", f"{summary.ok:,}"), ("errors", f"{bad:,}")]
    rows += [
        (f"  {code}", f"{count:,}, for example {printable(summary.examples[code])}")
        for code, count in summary.errors.items()
    ]
    if summary.kept_rows:
        rows.append(("kept", f"{summary.kept_rows:,}, written before"))
    if summary.reused:
        rows.append(("reused", f"{summary.reused:,}, not encoded again"))
    if summary.ignored:
        rows.append(("passed over", printable(by_suffix(summary.passed_over))))
    rows += [
        ("tokens", f"{summary.tokens:,}"),
        *effort(summary),
        ("model", summary.model),
        ("folder", summary.folder),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def effort(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield the lines on time and speed; none if nothing was embedded."""
    shares = summary.shares
    if summary.kept_rows == summary.rows:
        return
    yield (
        "time",
        f"{duration(summary.seconds)}: {summary.images_per_second:,.1f} images/s, "
        f"{summary.tokens_per_second:,.0f} tokens/s",
    )
    parts = ", ".join(f"{n} {getattr(shares, n):.0%}" for n in ("decoding", "encoding", "writing"))
    yield "busy", f"{parts} of the time; the slowest is {shares.slowest}"
    if shares.fill:
        yield "packs", f"{shares.fill:.0%} full"
    if summary.on_gpu is not None:
        yield "on the GPU", f"{summary.on_gpu:,} images decoded there; Pillow decoded the others"
    if summary.halved:
        yield "halved", f"{summary.halved:,} packs that did not fit in memory"
