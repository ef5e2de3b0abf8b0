"""Run all available contenders on all chosen workloads, and return the report."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packvit.bench import DTYPES, SEED, WORKLOADS, BenchError, BenchOptions, models
from packvit.bench.accuracy import fp8_accuracy
from packvit.bench.contenders import (
    Subject,
    Unavailable,
    collect,
    forward,
    forward_backward,
    weight_bytes,
)
from packvit.bench.correctness import difference, right, smallest
from packvit.bench.measuring import (
    CEILING,
    CLOCKS,
    Run,
    Times,
    at_most,
    ceiling,
    commit,
    gpu_state,
    interleave,
    median_ms,
    peak_bytes,
    seconds,
    times_faster,
    where,
)
from packvit.bench.ours import OURS, Ours
from packvit.bench.peers import Peer, peers
from packvit.bench.workloads import encoder_flops, in_squares, on_own_grid, workload
from packvit.encoder import Encoder
from packvit.model.device import find_device
from packvit.version import version_of

Say = Callable[[str], object]

SLOW = 2.0  # seconds: slower contenders run in three rounds only
SLOW_ROUNDS = 3
WARMUP = 2
# torch's own are RuntimeErrors; what is stopped in the middle may say anything.
OBSTACLES = (Unavailable, ImportError, ValueError, RuntimeError, TimeoutError)


class Entrant(NamedTuple):
    """A contender whose tokens are correct, ready to be timed."""

    run: Run
    plain: Run  # the same without CUDA graphs, to measure memory: graphs hide the encoder's
    ours: bool
    exact: bool  # computes in the chosen dtype throughout, unlike fp8
    weights: int  # bytes
    off: dict[str, float]  # difference from the baseline's tokens
    first: float  # seconds of a call after warm-up


def measure(
    options: BenchOptions,
    say: Say,
    *,
    seconds: float | None = None,
    ways: Collection[str] = (),
) -> dict[str, Any]:
    """Return the report of all workloads; `say` is called with progress messages.

    `seconds` is how long all may take: contenders that time does not suffice for are left out.
    `ways` are the contenders to be timed beside the baseline, by their titles; all by default.

    Raises: BenchError, CheckpointError, ImportError if nothing can be measured.
    """
    device, dtype = choose(options)
    on_gpu = device.type == "cuda"
    if device.index is not None and on_gpu:
        torch.cuda.set_device(device)  # clocks and peak memory are read from it
    layers = options.layers
    if not on_gpu and layers is None and options.model in models.SIZES:
        layers = 2
    compiled = on_gpu if options.compiled is None else options.compiled
    model = models.build(options.model, layers, device, dtype)
    until = None if seconds is None else monotonic() + seconds
    beside = peers(model.encoder.family.reference.library)
    candidates = choose_ways((*beside, *OURS), ways)
    report = describe_run(options, model, device, dtype)
    report |= {"baseline": beside[0].title, "workloads": []}
    for name in options.workloads:
        torch.compiler.reset()  # one workload's shapes must not make others dynamic
        work = workload(name, small=not on_gpu)
        if model.own_grid is not None:
            work = on_own_grid(work, *model.own_grid)
        work = in_squares(work, model.multiple)
        draw = torch.Generator().manual_seed(SEED)
        patches = torch.randn(
            sum(work.lengths),
            model.config.patch_dim,
            generator=draw,
            dtype=torch.float32,
            device="cpu",
        )
        subject = Subject(model, work, patches.to(device, dtype), compiled, options.train)
        say(f"{work.title}: {len(work.grid)} images, {len(patches):,} patches")
        with torch.set_grad_enabled(options.train), torch.inference_mode(not options.train):
            report["workloads"].append(measure_workload(subject, candidates, options, say, until))
    report["gpu_state_after"] = gpu_state()
    report["fp8_accuracy"] = []
    if on_gpu and dtype == torch.bfloat16 and not options.train and not ways:
        say("accuracy of fp8")
        with suppress(ValueError):  # the reason is listed with its contenders
            report["fp8_accuracy"] = fp8_accuracy(model, device)
    return report


def describe_run(
    options: BenchOptions, model: models.Model, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what is said of a run before it starts."""
    return where() | {
        "commit": options.commit or commit(),
        "timm": version_of("timm"),
        "gpu_state_before": gpu_state(),
        "model": model.name,
        "weights": model.weights,
        "layers": model.config.layers,
        "width": model.config.width,
        "pass": "forward and backward" if options.train else "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "clock": options.clock,
        "rounds": options.rounds,
    }


def choose(options: BenchOptions) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to measure on.

    Raises: BenchError for an invalid device, dtype, workload or number of rounds.
    """
    try:
        find_device(options.device)
    except ValueError as error:
        raise BenchError(str(error)) from error
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        raise BenchError(
            f"No workload is called {unknown[0]}. Choose one of: {', '.join(WORKLOADS)}."
        )
    if options.clock not in CLOCKS or (options.clock == "cpu" and device.type != "cpu"):
        raise BenchError(f'clock is "{options.clock}", but must be "wall", or on a CPU "cpu".')
    if options.rounds < 2:
        raise BenchError(f"rounds is {options.rounds}, but quartiles need at least 2.")
    chosen = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if chosen not in DTYPES:
        raise BenchError(f'dtype is "{chosen}". Choose one of: {", ".join(DTYPES)}.')
    return device, getattr(torch, chosen)


def choose_ways(candidates: Sequence[Peer | Ours], ways: Collection[str]) -> Sequence[Peer | Ours]:
    """Return the baseline and those that are named, or all. Raises: BenchError for another name."""
    titles = [candidate.title for candidate in candidates]
    if unknown := [way for way in ways if way not in titles]:
        raise BenchError(f'No contender is called "{unknown[0]}". Choose of: {"; ".join(titles)}.')
    baseline, *others = candidates
    return [baseline, *(one for one in others if not ways or one.title in ways)]


def measure_workload(
    subject: Subject,
    candidates: Sequence[Peer | Ours],
    options: BenchOptions,
    say: Say,
    until: float | None = None,
) -> dict[str, Any]:
    """Check every contender's tokens, then time those that are right, turn by turn.

    The first candidate is the baseline. `until` is when, by `monotonic`, all must be done: those
    that would not be are left out.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (len(subject.patches), subject.model.config.width)
    cotangent = None
    if subject.train:
        drawn = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
        cotangent = drawn.to(subject.patches)
    missing: dict[str, str] = {}
    wrong: dict[str, dict[str, float]] = {}
    entrants: dict[str, Entrant] = {}
    truth: Tensor | None = None
    judged, exact = smallest(subject)
    baseline = candidates[0].title
    for candidate in candidates:
        with (
            reasons(candidate.title, missing, say),
            at_most(left(candidate, entrants, options, until)),
        ):
            contender = candidate.build(subject)
            tokens = collect(contender, len(subject.patches)).float()
            truth = tokens if truth is None else truth
            off = difference(tokens, truth)
            if not right(candidate, tokens, truth, judged, exact, subject):
                wrong[candidate.title] = off
                say(f"  {candidate.title}: WRONG, off by {off['relative_difference']:.1e}")
                continue
            run = (
                forward(contender) if cotangent is None else forward_backward(contender, cotangent)
            )
            if subject.train:
                run()  # compiles its backward
            entrants[candidate.title] = Entrant(
                run=run,
                plain=without_graphs(contender.module, run),
                ours=isinstance(candidate, Ours),
                exact=getattr(candidate, "limit", None) is None,
                weights=weight_bytes(contender.module),
                off=off,
                first=seconds(run, options.clock),
            )
            say(f"  {candidate.title}: {entrants[candidate.title].first * 1e3:.1f} ms")
    if baseline not in entrants:
        raise BenchError(f"{baseline} cannot run here: {missing[baseline]}.")
    top, top_flops = ceiling(subject.patches.device, subject.patches.dtype)
    taken = interleave(
        {CEILING: top, **{title: entrant.run for title, entrant in entrants.items()}},
        rounds=options.rounds,
        warmup=WARMUP,
        clock=options.clock,
        fewer={title: SLOW_ROUNDS for title, entrant in entrants.items() if entrant.first > SLOW},
    )
    flops = encoder_flops(subject.model.config, subject.workload.grid)
    work = flops.forward + (flops.backward if subject.train else 0)
    rate = top_flops / median_ms(taken, CEILING) * 1e3
    best = headline(entrants, taken)
    return {
        "name": subject.workload.name,
        "title": subject.workload.title,
        "images": len(subject.workload.grid),
        "tokens": len(subject.patches),
        "fewest": min(subject.workload.lengths),
        "most": max(subject.workload.lengths),
        "scaled_down": subject.workload.scaled_down,
        "tflop": work / 1e12,
        "ceiling_tflops": rate / 1e12,
        "headline": best,
        "results": {
            title: result(title, entrant, taken, work / rate, subject.patches.device)
            | {
                "times_faster_than_baseline": times_faster(taken, title, baseline),
                "times_faster_than_strongest_peer": times_faster(taken, title, best["peer"]),
                "images_per_second": 1e3 * len(subject.workload.grid) / median_ms(taken, title),
            }
            for title, entrant in entrants.items()
        },
        "wrong": wrong,
        "missing": missing,
    }


def left(
    candidate: Peer | Ours, entrants: dict[str, Entrant], options: BenchOptions, until: float | None
) -> float | None:
    """Return how many seconds a contender may take until its turn is over; None is any number.

    Raises: Unavailable if none are left besides those of the rounds to come.
    """
    if until is None or not entrants:
        return candidate.longest if isinstance(candidate, Peer) else None
    round_ = sum(min(entrant.first, SLOW) for entrant in entrants.values())
    rest = until - monotonic() - 1.3 * (options.rounds + WARMUP) * round_
    if rest <= 0:
        raise Unavailable("no time was left for it")
    return min(rest, candidate.longest or rest) if isinstance(candidate, Peer) else rest


@contextmanager
def reasons(title: str, missing: dict[str, str], say: Say) -> Iterator[None]:
    """Record why a contender cannot run."""
    try:
        yield
    except OBSTACLES as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        missing[title] = first.rstrip(".")
        say(f"  {title}: missing, {missing[title]}")
    if title in missing and torch.cuda.is_available():
        torch.cuda.empty_cache()


def without_graphs(module: nn.Module, run: Run) -> Run:
    """Return `run` with the CUDA graphs of our encoder turned off."""

    def plain() -> None:
        if not isinstance(module, Encoder) or module.fast is None:
            run()
            return
        graphs, module.fast.graphs = module.fast.graphs, None
        try:
            run()
        finally:
            module.fast.graphs = graphs

    return plain


def result(
    title: str, entrant: Entrant, taken: list[Times], floor: float, device: torch.device
) -> dict[str, Any]:
    """Return a contender's figures; `floor` is the time of the work at the matmul rate."""
    median, more = median_ms(taken, title), peak_bytes(entrant.plain, device)
    return {
        "ours": entrant.ours,
        "median_ms": median,
        "rounds": sum(title in times for times in taken),
        "fraction_of_ceiling": floor / median * 1e3,
        "peak_gib": None if more is None else (more + entrant.weights) / 2**30,
        **entrant.off,
    }


def headline(entrants: dict[str, Entrant], taken: list[Times]) -> dict[str, Any]:
    """Return the strongest peer and, if we have one, our fastest exact contender beside it."""

    def fastest(*, ours: bool) -> str | None:
        titles = [t for t, one in entrants.items() if one.ours == ours and (one.exact or not ours)]
        return min(titles, key=lambda title: median_ms(taken, title), default=None)

    peer, best = fastest(ours=False), fastest(ours=True)
    assert peer is not None  # the baseline is one
    return {"peer": peer} | (
        {} if best is None else {"ours": best, "times_faster": times_faster(taken, best, peer)}
    )
