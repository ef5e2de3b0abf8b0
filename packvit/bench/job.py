"""Run every contender that can, on every workload asked for, and write down what came of it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packvit import hub
from packvit.bench import DTYPES, SEED, WORKLOADS, BenchError, Plan, models
from packvit.bench.accuracy import fp8_accuracy
from packvit.bench.contenders import (
    Contender,
    Subject,
    Unavailable,
    collect,
    forward,
    forward_backward,
    weight_bytes,
)
from packvit.bench.measuring import (
    CEILING,
    CLOCKS,
    Run,
    Times,
    ceiling,
    gpu_state,
    interleave,
    median_ms,
    peak_bytes,
    seconds,
    times_faster,
    where,
)
from packvit.bench.ours import OURS, Ours
from packvit.bench.peers import BASELINE, PEERS, Peer
from packvit.bench.workloads import encoder_flops, workload
from packvit.encoder import Encoder
from packvit.verification import references
from packvit.verification.rule import judge
from packvit.version import version_of

Say = Callable[[str], object]

# The most that ‖tokens - the baseline's‖ / ‖the baseline's‖ may be over the whole pack. Through the
# 24 layers of AIMv2-large in bf16 two right answers are 0.012 apart (on a CPU); swapped axes, or
# channels, move tokens by tenths.
LIMITS = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}
# Tokens of the smallest images, which the baseline computes in float64 too: the rule of `packvit
# verify` judges by them, with the baseline as the reference.
JUDGED_TOKENS = 512
SLOW = 2.0  # seconds: what takes longer takes part in three rounds alone
SLOW_ROUNDS = 3
WARMUP = 2
OBSTACLES = (Unavailable, ImportError, ValueError, RuntimeError)  # torch's own are RuntimeErrors


class Entrant(NamedTuple):
    """A contender whose tokens are right, ready to be timed."""

    run: Run
    plain: Run  # the same without CUDA graphs, whose memory cannot be told from the encoder's
    ours: bool
    exact: bool  # in the dtype that was asked for throughout, which fp8 is not
    weights: int  # bytes
    off: dict[str, float]  # from the baseline's tokens
    first: float  # seconds of a call, once it has run


def measure(plan: Plan, say: Say) -> dict[str, Any]:
    """Return the report of all workloads; `say` is told what is going on.

    Raises: BenchError, CheckpointError, ImportError for what cannot be measured at all.
    """
    device, dtype = choose(plan)
    on_gpu = device.type == "cuda"
    if device.index is not None and on_gpu:
        torch.cuda.set_device(device)  # the one that clocks and peaks are asked of
    layers = plan.layers
    if not on_gpu and layers is None and plan.model in models.SIZES:
        layers = 2
    compiled = on_gpu if plan.compiled is None else plan.compiled
    model = models.build(plan.model, layers, device, dtype)
    report = where() | {
        "timm": version_of("timm"),
        "gpu_state_before": gpu_state(),
        "model": model.name,
        "weights": model.weights,
        "layers": model.config.layers,
        "width": model.config.width,
        "pass": "forward and backward" if plan.train else "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "clock": plan.clock,
        "rounds": plan.rounds,
        "baseline": BASELINE,
        "workloads": [],
    }
    for name in plan.workloads:
        torch.compiler.reset()  # shapes of one workload must not make another's code general
        work = workload(name, small=not on_gpu)
        draw = torch.Generator().manual_seed(SEED)
        patches = torch.randn(
            sum(work.lengths),
            model.config.patch_dim,
            generator=draw,
            dtype=torch.float32,
            device="cpu",
        )
        subject = Subject(model, work, patches.to(device, dtype), compiled, plan.train)
        say(f"{work.title}: {len(work.grid)} images, {len(patches):,} patches")
        with torch.set_grad_enabled(plan.train), torch.inference_mode(not plan.train):
            report["workloads"].append(measure_workload(subject, plan, say))
    report["gpu_state_after"] = gpu_state()
    report["fp8_accuracy"] = []
    if on_gpu and dtype == torch.bfloat16 and not plan.train:
        say("accuracy of fp8")
        with suppress(ValueError):  # why it cannot run stands beside its contenders
            report["fp8_accuracy"] = fp8_accuracy(model, device)
    return report


def choose(plan: Plan) -> tuple[torch.device, torch.dtype]:
    """Return where and in what to measure.

    Raises: BenchError for a device, dtype, workload or number of rounds that cannot be.
    """
    try:
        hub.check_device(plan.device)
    except ValueError as error:
        raise BenchError(str(error)) from error
    device = torch.device(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if unknown := [name for name in plan.workloads if name not in WORKLOADS]:
        raise BenchError(f"No workload is called {unknown[0]}. Choose of: {', '.join(WORKLOADS)}.")
    if plan.clock not in CLOCKS or (plan.clock == "cpu" and device.type != "cpu"):
        raise BenchError(f'clock is "{plan.clock}", but must be "wall", or on a CPU "cpu".')
    if plan.rounds < 2:
        raise BenchError(f"rounds is {plan.rounds}, but quartiles want at least 2.")
    chosen = plan.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if chosen not in DTYPES:
        raise BenchError(f'dtype is "{chosen}". Choose one of: {", ".join(DTYPES)}.')
    return device, getattr(torch, chosen)


def measure_workload(subject: Subject, plan: Plan, say: Say) -> dict[str, Any]:
    """Check every contender's tokens, then time those that are right, turn by turn."""
    draw = torch.Generator().manual_seed(0)
    shape = (len(subject.patches), subject.model.config.width)
    cotangent = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(
        subject.patches
    )
    missing: dict[str, str] = {}
    wrong: dict[str, dict[str, float]] = {}
    entrants: dict[str, Entrant] = {}
    truth: Tensor | None = None
    judged, exact = smallest(subject)
    for candidate in (*PEERS, *OURS):  # the baseline first
        with reasons(candidate.title, missing, say):
            contender = candidate.build(subject)
            tokens = collect(contender, len(subject.patches)).float()
            truth = tokens if truth is None else truth
            off = difference(tokens, truth)
            if not right(candidate, tokens, truth, judged, exact, subject):
                wrong[candidate.title] = off
                say(f"  {candidate.title}: WRONG, off by {off['relative_difference']:.1e}")
                continue
            run = runner(contender, cotangent if subject.train else None)
            if subject.train:
                run()  # its backward has not been compiled yet
            entrants[candidate.title] = Entrant(
                run=run,
                plain=without_graphs(contender.module, run),
                ours=isinstance(candidate, Ours),
                exact=getattr(candidate, "limit", None) is None,
                weights=weight_bytes(contender.module),
                off=off,
                first=seconds(run, plan.clock),
            )
            say(f"  {candidate.title}: {entrants[candidate.title].first * 1e3:.1f} ms")
    if BASELINE not in entrants:
        raise BenchError(f"{BASELINE} cannot run here: {missing[BASELINE]}.")
    top, top_flops = ceiling(subject.patches.device, subject.patches.dtype)
    taken = interleave(
        {CEILING: top, **{title: entrant.run for title, entrant in entrants.items()}},
        rounds=plan.rounds,
        warmup=WARMUP,
        clock=plan.clock,
        fewer={title: SLOW_ROUNDS for title, entrant in entrants.items() if entrant.first > SLOW},
    )
    flops = encoder_flops(subject.model.config, subject.workload.grid)
    work = flops.forward + (flops.backward if subject.train else 0)
    rate = top_flops / median_ms(taken, CEILING) * 1e3
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
        "headline": headline(entrants, taken),
        "results": {
            title: result(title, entrant, taken, work / rate, subject.patches.device)
            for title, entrant in entrants.items()
        },
        "wrong": wrong,
        "missing": missing,
    }


@contextmanager
def reasons(title: str, missing: dict[str, str], say: Say) -> Iterator[None]:
    """Put on record why a contender cannot take part."""
    try:
        yield
    except OBSTACLES as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        missing[title] = first.rstrip(".")
        say(f"  {title}: missing, {missing[title]}")
    if title in missing and torch.cuda.is_available():
        torch.cuda.empty_cache()


def runner(contender: Contender, cotangent: Tensor | None) -> Run:
    """Return what is timed."""
    if cotangent is None:
        return forward(contender)
    return forward_backward(contender, cotangent)


def without_graphs(module: nn.Module, run: Run) -> Run:
    """Return a run during which an encoder of ours has no CUDA graphs, and makes none."""

    def plain() -> None:
        if not isinstance(module, Encoder):
            run()
            return
        graphs, module.graphs = module.graphs, None
        try:
            run()
        finally:
            module.graphs = graphs

    return plain


def smallest(subject: Subject) -> tuple[Tensor, Tensor]:
    """Return which rows are judged, and what the baseline makes of them in float64.

    Shapes: rows [R], tokens [R, D]: of the smallest images, some `JUDGED_TOKENS` of them.
    """
    order = sorted(range(len(subject.images)), key=lambda image: subject.workload.lengths[image])
    some, tokens = [], 0
    while order and tokens < JUDGED_TOKENS:
        some.append(order.pop(0))
        tokens += subject.workload.lengths[some[-1]]
    model = copy.deepcopy(subject.model.reference).double()
    patches = [subject.images[image] for image in some]
    grid = tuple(subject.workload.grid[image] for image in some)
    interpolates = subject.model.resizes and subject.model.encoder.family.reference.interpolates
    with torch.no_grad():
        said = references.run(model, patches, grid, interpolate=interpolates)
    return torch.cat([subject.rows[image] for image in some]), torch.cat(list(said["tokens"]))


def right(
    candidate: Peer | Ours,
    tokens: Tensor,
    truth: Tensor,
    rows: Tensor,
    exact: Tensor,
    subject: Subject,
) -> bool:
    """Return whether a contender's tokens pass: by the rule, or in 8 bits by a limit of its own.

    The rule judges the images in `rows`, whose truth is `exact`; `LIMITS` holds for the whole pack.
    """
    if isinstance(candidate, Ours) and candidate.limit is not None:
        return difference(tokens, truth)["relative_difference"] <= candidate.limit
    if tokens is truth:
        return bool(tokens.isfinite().all())
    dtype, blocks = subject.patches.dtype, subject.model.config.layers
    if not difference(tokens, truth)["relative_difference"] <= LIMITS[dtype]:  # nor is NaN
        return False
    return all(
        one.passed
        for one in judge([tokens[rows]], [truth[rows]], [exact], dtype=dtype, blocks=blocks)
    )


def difference(tokens: Tensor, truth: Tensor) -> dict[str, float]:
    """Return how far tokens are from the baseline's: at the worst, and as a whole."""
    off = tokens - truth
    return {
        "largest_scaled_difference": (off.abs().max() / max(1.0, truth.abs().max() / 4)).item(),
        "relative_difference": (off.norm() / truth.norm()).item(),
    }


def result(
    title: str, entrant: Entrant, taken: list[Times], floor: float, device: torch.device
) -> dict[str, Any]:
    """Return a contender's figures; `floor` is the seconds that the work takes at the ceiling."""
    median, more = median_ms(taken, title), peak_bytes(entrant.plain, device)
    return {
        "ours": entrant.ours,
        "median_ms": median,
        "rounds": sum(title in times for times in taken),
        "times_faster_than_baseline": times_faster(taken, title, BASELINE),
        "fraction_of_ceiling": floor / median * 1e3,
        "peak_gib": None if more is None else (more + entrant.weights) / 2**30,
        **entrant.off,
    }


def headline(entrants: dict[str, Entrant], taken: list[Times]) -> dict[str, Any] | None:
    """Return our fastest exact contender beside the strongest peer; None if we have none."""
    ours = [title for title, entrant in entrants.items() if entrant.ours and entrant.exact]
    peers = [title for title, entrant in entrants.items() if not entrant.ours]
    if not ours:
        return None
    best, strongest = (
        min(titles, key=lambda title: median_ms(taken, title)) for titles in (ours, peers)
    )
    return {"ours": best, "peer": strongest, "times_faster": times_faster(taken, best, strongest)}
