"""Write the pages that are printed from the code; a test fails when one is out of date.

python -m docs.generate
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import packvit
from benchmarks import howlarge
from docs.bulk import bulk_tables
from docs.sizes import families_table
from docs.tables import checkpoints_page, families_page, mixed_table, native_table, text_page
from packvit.bench import MODELS, NATIVE
from packvit.bench.table import as_markdown
from packvit.cli import help_page
from packvit.images.errors import CODES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDED = (  # regions of docs/benchmarks.md, each the newest run of one of `MACHINES`
    "bench-aimv2-large",
    "bench-siglip2-so400m",
    "bench-aimv2-large-train",
    "bench-siglip2-so400m-train",
    "bench-aimv2-large-equal",
    "bench-aimv2-large-small",
    "bench-aimv2-large-huge",
    "bench-cpu-float32",
    "bench-cpu-bfloat16",
)
MACHINES = ("-h200", "-h100", "")


def reference_page() -> str:
    """Return every public name with its signature and docstring."""
    page = ["# Reference\n\nWritten by `docs/generate.py` from the docstrings.\n"]
    for name in packvit.__all__:
        thing = getattr(packvit, name)
        page.append(f"## `packvit.{name}`\n\n{entry(name, thing)}")
        if inspect.isclass(thing) and name in ("Encoder", "Features", "Segments", "TextEncoder"):
            page += [
                f"### `{name}.{method}`\n\n{entry(method, member)}"
                for method, member in public_methods(thing)
            ]
    return "\n".join(page)


def public_methods(kind: type) -> list[tuple[str, object]]:
    """Return the methods and properties that a class itself defines, in its order."""
    found = []
    for name, member in vars(kind).items():
        inner = getattr(member, "__func__", member)
        if not name.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)):
            found.append((name, inner))
    return found


def entry(name: str, thing: object) -> str:
    """Return one signature and docstring as text."""
    doc = inspect.getdoc(thing) or ""
    if isinstance(thing, property):
        return f"{doc}\n"
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f"{doc}\n"
    shown = str(inspect.signature(thing)) if callable(thing) else ""
    # Defaults and annotations print as Python shows them; module paths only make them longer.
    shown = re.sub(
        r"\b(?:packvit\.[a-z0-9_.]+|torch\.nn\.modules\.module|typing|collections\.abc)\.",
        "",
        shown,
    )
    return f"```\n{name}{shown}\n```\n\n{doc}\n"


def codes_table() -> str:
    """Return what each code of an error row means."""
    rows = [f"| `{code}` | {words} |" for code, words in CODES.items()]
    return "\n".join(["| code | the input |", "|---|---|", *rows]) + "\n"


def newest(name: str) -> dict[str, Any] | None:
    """Return the newest run recorded under a name, whichever machine it was on."""
    paths = [RESULTS / f"{name}{machine}.json" for machine in MACHINES]
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    return max(reports, key=lambda report: report["date"], default=None)


def recorded(name: str) -> str:
    """Return the tables of the newest run recorded under a name."""
    report = newest(name)
    return as_markdown(report) if report else "No run is recorded yet.\n"


def native_page() -> str:
    """Return one line for the newest run of each batch at native size that is recorded."""
    rows = (newest(f"native/{name}") for name in NATIVE)
    reports = [report for report in rows if report]
    return native_table(reports) if reports else "No run is recorded yet.\n"


def mixed_page() -> str:
    """Return one line for the newest run of each model on mixed sizes that is recorded."""
    return mixed_table([report for model in MODELS if (report := newest(f"bench-{model}"))])


def speed_sentence() -> str:
    """Return what README's chart shows and what it does not, with machines and days."""
    ratios = []
    for name in ("bench-aimv2-large", "bench-siglip2-so400m"):
        for run in (name, f"{name}-train"):
            report = newest(run)
            assert report
            [mixed] = (load for load in report["workloads"] if load["name"] == "mixed")
            ratios.append(f"{mixed['headline']['times_faster'][1]:.2f}")
    first = newest("bench-aimv2-large")
    native = [report for name in NATIVE if (report := newest(f"native/{name}"))]
    assert first
    assert native
    equal = sorted(report["workloads"][0]["headline"]["times_faster"][1] for report in native)
    where = f"one {first['gpus']}, {first['date']}"
    elsewhere = f"one {native[0]['gpus']}, {max(report['date'] for report in native)}"
    return (
        f"Inference on 52 images of mixed sizes (bf16, {where}) is {ratios[0]} times\n"
        f"as fast as the best peer's with AIMv2-large and {ratios[2]} times with SigLIP2-so400m;\n"
        f"a training step is {ratios[1]} and {ratios[3]} times as fast. Batches of one size gain\n"
        f"less: {equal[0]:.2f} to {equal[-1]:.2f} times as fast as the best compiled peer, in "
        f"{len(native)} models\n({elsewhere}).\n"
    )


def sizing_table() -> str:
    """Return what the measured rates mean for a billion images.

    `bench-aimv2-large` is the encoder alone on packs that lie ready, `feeding` the job beside its
    encoder. An `embed-*.json` is what `packvit embed --json` printed, with the machine's facts
    beside it: `gpus` and `processes`.
    """
    report, fed = newest("bench-aimv2-large"), newest("feeding")
    assert report
    assert fed
    (mixed,) = (load for load in report["workloads"] if load["name"] == "mixed")
    best = mixed["results"][mixed["headline"]["ours"]]["median_ms"]
    rate = mixed["tokens"] / best * 1000
    alone = f"AIMv2-large bf16, {report['gpus']}, the encoder alone"
    rows = [(alone, tokens, rate / tokens) for tokens in (256, 1024)]
    for way in ("gpu", "pil"):
        name = f"{fed['workload']['model']}, {fed['gpus']}, from JPEGs to parts, --decode {way}"
        found = fed["results"][f"job, {way}"]["images_per_second"]
        rows.append((name, fed["workload"]["patches_each"], found))
    for path in sorted(RESULTS.glob("embed-*.json")):
        done = json.loads(path.read_text())
        processes = done.get("processes", 1)
        name = f"{done['model']}, {processes} x {done['gpus']}, from files to parts"
        rows.append((name, done["tokens"] / done["ok"], done["images_per_second"] / processes))
    lines = [
        "| measured | T | images/s on one | images per GPU-hour | 1 billion images on 8 | on 64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, tokens, images in rows:
        days = [1e9 / images / gpus / 86400 for gpus in (8, 64)]
        lines.append(
            f"| {name} | {tokens:,.0f} | {images:,.0f} | {images * 3600 / 1e6:,.1f} million | "
            + " | ".join(f"{d:,.1f} days" for d in days)
            + " |"
        )
    return "\n".join(lines) + "\n"


def billion_table() -> str:
    """Return what a billion photographs take, as `benchmarks.howlarge` prints it."""
    return howlarge.as_markdown(howlarge.estimate(1e9, 64, 8, 2.5))


RATE, STEADY = "images_per_second", "steady_images_per_second"
FEEDING = (  # results of benchmarks/feeding.py, in our words
    ("encoder", RATE, "the encoder on the same packs, patches on the device"),
    ("encoder from the host", RATE, "the same, patches on the host"),
    ("job, gpu", RATE, "the job, `--decode gpu`, from its first input to its last part"),
    ("job, gpu", STEADY, "the same, between a fifth and nine tenths of its rows"),
    ("job, pil", RATE, "the job, `--decode pil`"),
)


def feeding_table() -> str:
    """Return how fast whole jobs are beside their encoder's own speed."""
    fed = newest("feeding")
    assert fed
    found, load = fed["results"], fed["workload"]
    lines = [
        f"{load['model']} in {load['dtype']}, {load['patches_each']:.0f} patches an image, "
        f"{load['workers']} workers, {fed['gpus']}, {fed['date']}.\n",
        "| what | images/s | of the encoder's own speed |",
        "|---|---|---|",
    ]
    for name, field, words in FEEDING:
        rate = found[name][field]
        lines.append(f"| {words} | {rate:,.0f} | {rate / found['encoder'][RATE]:.2f} |")
    return "\n".join(lines) + "\n"


THRESHOLDS = ("0.85", "0.9", "0.95", "0.97", "0.98", "0.99")

SEARCHES = (  # results of benchmarks/retrieval.py, in our words
    ("search: ours, over the parts", "packvit search, over the parts"),
    ("search: ours, over a mapped matrix", "packvit, over an exported matrix (--format npy)"),
    ("search: faiss flat", "faiss flat, loaded before"),
    ("search: usearch exact", "usearch exact"),
)


def million_table() -> str:
    """Return the times of search, labels and duplicates in a large folder."""
    run = json.loads((RESULTS / "retrieval-cpu.json").read_text())
    load, found = run["workload"], run["results"]
    threads = f"{load['threads']} thread{'' if load['threads'] == 1 else 's'}"
    counts = f"{load['rows']:,} rows of {load['width']} numbers, {threads}"
    lines = [f"{counts:<62}  one query  100 queries  owned, GiB"]

    def line(name: str, words: str, *times: str) -> str:
        return f"  {words:<60}{times[0]:>11}{times[1]:>13}{found[name]['owned_gib']:>12.2f}"

    for name, words in SEARCHES:
        one, many = found[name]["one_query_s"], found[name]["hundred_queries_s"]
        lines.append(line(name, words, f"{one:.2f} s", f"{many:.2f} s"))
    lines.append(f"the best of {load['labels']:,} labels for each row")
    for name, words in (
        (
            "zeroshot: ours, with scores and table",
            "packvit zeroshot, with probabilities and a table",
        ),
        ("zeroshot: faiss, best label alone", "faiss flat, the label alone"),
    ):
        lines.append(line(name, words, f"{found[name]['s']:.1f} s", ""))
    lines.append("all pairs with a cosine of 0.95 or more")
    ours, faiss = found["dups: ours"], found["dups: faiss range search"]
    lines.append(
        line("dups: ours", f"packvit dups, {ours['groups']:,} groups", f"{ours['s']:.0f} s", "")
    )
    share = f"faiss range search, {faiss['s_of_first_rows']:.1f} s for {load['peer_rows']:,} rows"
    whole = f"{faiss['s_of_all']:,.0f} s"
    lines.append(line("dups: faiss range search", f"{share}: for all", whole, ""))
    index = found["index: ours, search --index"]
    lines.append(f"{load['index_rows']:,} rows")
    built = f"packvit search --index, built in {index['build_s']:.0f} s"
    lines.append(line("index: ours, search --index", built, f"{index['one_query_s']:.3f} s", ""))
    peers = f"faiss {run['faiss-cpu']}, usearch {run['usearch']}, torch {run['torch']}"
    said = f"{run['cores']} CPU cores, {run['date']}, {peers} (`results/retrieval-cpu.json`)."
    return "```\n" + "\n".join(lines) + f"\n```\n\n{said}\n"


def copies_table() -> str:
    """Return which changed copies of photographs are found at which threshold."""
    run = json.loads((RESULTS / "duplicates-demo-model.json").read_text())
    found = {threshold: run["results"][threshold] for threshold in THRESHOLDS}
    lines = ["| threshold | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for name in ("precision", "recall"):
        shares = (f"{row[name]:.2f}" for row in found.values())
        lines.append(f"| {name}, all pairs | " + " | ".join(shares) + " |")
    for way in found[THRESHOLDS[0]]["recall_of_ways"]:
        shares = (f"{row['recall_of_ways'][way]:.2f}" for row in found.values())
        lines.append(f"| found: {way} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def fill(page: str, name: str, content: str) -> str:
    """Return a page with what stands between its two marks called `name` replaced."""
    marks = rf"(<!-- {name}: [^>]* -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(marks, lambda m: f"{m[1]}{content}{m[2]}", page, flags=re.DOTALL)
    assert count == 1, f"the marks of {name} must stand in the page once"
    return filled


def pages() -> dict[Path, str]:
    """Return every generated page, by its path."""
    readme, embedding = ROOT / "README.md", ROOT / "docs" / "embedding.md"
    sizing = ROOT / "docs" / "sizing.md"
    measured = ROOT / "docs" / "benchmarks.md"
    words, search = ROOT / "docs" / "text.md", ROOT / "docs" / "search.md"
    models, decoding = ROOT / "docs" / "models.md", ROOT / "docs" / "gpu-decoding.md"
    front = fill(readme.read_text(), "families", families_table())
    front = fill(front, "speed", speed_sentence())
    figures = measured.read_text()
    figures = fill(figures, "native", native_page())
    figures = fill(figures, "mixed", mixed_page())
    figures = fill(figures, "bulk", bulk_tables())
    for name in RECORDED:
        figures = fill(figures, name, recorded(name))
    figures = fill(figures, "million", million_table())
    return {
        measured: figures,
        ROOT / "docs" / "checkpoints.md": checkpoints_page(),
        ROOT / "docs" / "cli.md": help_page(),
        ROOT / "docs" / "reference.md": reference_page(),
        readme: front,
        words: fill(words.read_text(), "towers", text_page()),
        search: fill(search.read_text(), "copies", copies_table()),
        models: fill(models.read_text(), "layouts", families_page()),
        decoding: fill(decoding.read_text(), "feeding", feeding_table()),
        sizing: fill(
            fill(sizing.read_text(), "sizing", sizing_table()), "howlarge", billion_table()
        ),
        embedding: fill(embedding.read_text(), "codes", codes_table()),
    }


def main() -> None:
    """Write them all, or with `--check` name those that are out of date, and fail."""
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in sys.argv[1:] and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"Out of date: {names}. Run: python -m docs.generate")
    for path in stale:
        path.write_text(pages()[path])


if __name__ == "__main__":
    main()
