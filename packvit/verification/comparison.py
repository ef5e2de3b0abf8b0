"""Compare an encoder's outputs with its reference's, over shapes, packs, dtypes and backends."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packvit.encoder import Encoder
from packvit.model.attention import BACKENDS
from packvit.packs.grid import Grid
from packvit.verification import Comparison, VerifyOptions
from packvit.verification.answers import PER_FRAME, PER_SQUARE, Answers
from packvit.verification.drawing import Shapes, describe_grid, draw, plan_shapes
from packvit.verification.references import ReferenceModel
from packvit.verification.rule import Judgement, judge, judge_layers
from packvit.verification.running import run


@dataclass(frozen=True, slots=True)
class Round:
    """Images of some shapes in one precision, and what the reference makes of them."""

    shapes: Shapes
    patches: Sequence[Tensor]
    theirs: Answers  # in the same precision
    truth: Answers  # in float64, of the same inputs and weights
    finite: frozenset[int]  # the images of which the reference says no NaN


def compare_outputs(
    encoder: Encoder, reference: ReferenceModel, options: VerifyOptions
) -> Iterator[Comparison]:
    """Yield all comparisons. `encoder` computes in float32, and is not changed.

    In float32 every image is compared alone, among others and in reverse order; in lower
    precisions among others.
    """
    for name in ("float32", *options.lower):
        dtype = getattr(torch, name)
        ours = encoder if name == "float32" else lower(encoder, dtype)
        rounds = ask_reference(ours, reference, options)
        orders = ("alone", "among others", "reordered") if name == "float32" else ("among others",)
        for backend in backends(ours):
            clean: list[Answers] = []
            for order in orders:
                answers, attention = ask_all(ours, backend, order, rounds)
                yield from judge_answers(ours, attention, order, rounds, answers)
                if order == "among others":
                    clean = answers
            for asked, said in zip(rounds, clean, strict=True):
                with set_to(ours, backend, asked.shapes):
                    yield from compare_neighbours(ours, asked.patches, asked.shapes, said)


def ask_reference(
    encoder: Encoder, reference: ReferenceModel, options: VerifyOptions
) -> list[Round]:
    """Return the rounds in an encoder's precision, with the reference's answers."""
    planned = plan_shapes(encoder, options, reference.family.reference.interpolates)
    packs = [
        [patches.to(encoder.dtype) for patches in draw(shapes.grid, encoder, options.seed)]
        for shapes in planned
    ]

    def answers(model: nn.Module) -> list[Answers]:
        return [
            run(model, patches, shapes.grid, interpolate=shapes.interpolate)
            for shapes, patches in zip(planned, packs, strict=True)
        ]

    # A GPU would round the convolutions of float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = answers(reference.load(encoder.dtype, encoder.device))
        truths = answers(load_exactly(reference, encoder))
    return [
        Round(shapes, patches, said, truth, finite_images(said, len(shapes.grid)))
        for shapes, patches, said, truth in zip(planned, packs, theirs, truths, strict=True)
    ]


def load_exactly(reference: ReferenceModel, encoder: Encoder) -> nn.Module:
    """Return the reference in float64, with the very weights that it has in lower precision."""
    if encoder.dtype == torch.float32:
        return reference.load(torch.float64, encoder.device)
    return reference.load(encoder.dtype, encoder.device).double()


def finite_images(said: Answers, images: int) -> frozenset[int]:
    """Return the images for which there is something to compare with.

    In bfloat16 the reference said NaN for an image of 5 x 1 patches, with torch 2.11 on a CPU with
    AMX; its convolution is the suspect.
    """
    return frozenset(i for i in range(images) if all(x[i].isfinite().all() for x in said.values()))


def judge_pack(
    encoder: Encoder, backend: str, order: str, rounds: Sequence[Round]
) -> Iterator[Comparison]:
    """Ask an encoder of all rounds, packed in one order, and judge what it says."""
    answers, attention = ask_all(encoder, backend, order, rounds)
    yield from judge_answers(encoder, attention, order, rounds, answers)


def ask_all(
    encoder: Encoder, backend: str, order: str, rounds: Sequence[Round]
) -> tuple[list[Answers], str]:
    """Return what our encoder says of all rounds, and which attention ran."""
    answers, attention = [], backend
    for asked in rounds:
        with set_to(encoder, backend, asked.shapes):
            answers.append(ask_in(order, encoder, asked))
            attention = encoder.attention
    return answers, attention


def judge_answers(
    encoder: Encoder,
    attention: str,
    order: str,
    rounds: Sequence[Round],
    answers: Sequence[Answers],
) -> Iterator[Comparison]:
    """Judge tokens and layers shape by shape, and one vector of an image over all of them."""
    dtype, blocks = encoder.dtype, encoder.config.layers

    def row(what: str, where: str, judged: Judgement) -> Comparison:
        name, numbers = str(dtype).removeprefix("torch."), (judged.worst, judged.limit, judged.own)
        return Comparison(what, where, judged.measure, order, name, attention, *numbers)

    for asked, ours in zip(rounds, answers, strict=True):
        said = (ours, asked.theirs, asked.truth)
        for group in asked.shapes.groups():
            kept = [image for image in group if image in asked.finite]
            where = describe_grid([asked.shapes.grid[image] for image in group], asked.shapes)
            if lost := len(group) - len(kept):
                where = f"{where}, without {lost} for which the reference returns NaN"
            for kind in ("tokens", *(kind for kind in PER_SQUARE if has(kind, said))):
                outputs = [pick([x], [kept], kind) for x in said]
                for judged in judge(*outputs, dtype=dtype, blocks=blocks):
                    yield row(kind, where, judged)
            taps = [pick([x], [kept], "taps") for x in said]
            for layer, judged in worst_layers(judge_layers(*taps, dtype=dtype)):
                yield row("taps", f"{where}, layer {layer}", judged)
    kept = [sorted(asked.finite) for asked in rounds]
    where = f"{sum(map(len, kept))} images of all shapes"
    theirs, truth = [asked.theirs for asked in rounds], [asked.truth for asked in rounds]
    for kind in PER_FRAME:
        if has(kind, (*theirs, *answers)):
            vectors = (pick(said, kept, kind) for said in (answers, theirs, truth))
            for judged in judge(*vectors, dtype=dtype, blocks=blocks):
                yield row(kind, where, judged)


def has(kind: str, answers: Iterable[Answers]) -> bool:
    """Return whether anyone says anything of a kind."""
    return any(kind in said for said in answers)


def worst_layers(found: Iterable[tuple[int, Judgement]]) -> list[tuple[int, Judgement]]:
    """Return of each measure the layer that is nearest to its limit, or furthest beyond it."""
    worst: dict[str, tuple[int, Judgement]] = {}
    for layer, judged in found:
        before = worst.get(judged.measure)
        if before is None or judged.used > before[1].used:
            worst[judged.measure] = layer, judged
    return list(worst.values())


def pick(
    answers: Sequence[Answers], kept: Sequence[Sequence[int]], kind: str
) -> list[Tensor] | None:
    """Return one kind of output of the kept images of each round; None where there is none."""
    if not any(kept) or any(kind not in said for said in answers):
        return None
    return [
        said[kind][image] for said, images in zip(answers, kept, strict=True) for image in images
    ]


def backends(encoder: Encoder) -> list[str]:
    """Return the names of the attention backends that can run this encoder."""
    return [
        backend.name for backend in BACKENDS if backend.obstacle(encoder.attention_inputs) is None
    ]


@contextmanager
def set_to(encoder: Encoder, backend: str, shapes: Shapes) -> Iterator[None]:
    """Set the attention backend and interpolation of an encoder while the context lasts."""
    before = encoder.backend, encoder.embeddings.interpolate
    encoder.backend, encoder.embeddings.interpolate = backend, shapes.interpolate
    try:
        yield
    finally:
        encoder.backend, encoder.embeddings.interpolate = before


def lower(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """Return a copy in `dtype` that shares the checkpoint object."""
    return deepcopy(encoder, {id(encoder.checkpoint): encoder.checkpoint}).to(dtype)


def ask_in(order: str, encoder: Encoder, asked: Round) -> Answers:
    """Return what our encoder says of a round, its images packed as `order` says."""
    grid, patches = asked.shapes.grid, asked.patches
    if order == "among others":
        return ask(encoder, patches, grid)
    if order == "reordered":
        back = ask(encoder, patches[::-1], grid[::-1])
        return {kind: outputs[::-1] for kind, outputs in back.items()}
    alone = [ask(encoder, [one], (place,)) for one, place in zip(patches, grid, strict=True)]
    return {kind: [one[kind][0] for one in alone] for kind in alone[0]}


@torch.no_grad()
def ask(encoder: Encoder, patches: Sequence[Tensor], grid: Grid) -> Answers:
    """Return all outputs of our encoder for one pack, image by image."""
    found = encoder.encode(
        torch.cat(list(patches)),
        torch.tensor(grid, dtype=torch.int64, device="cpu"),
        taps=range(encoder.config.layers),
        projected=encoder.projection is not None,
        merged=encoder.merger is not None,
    )
    lengths = [frames * rows * columns for frames, rows, columns in grid]
    taps = torch.stack(list(found.taps.values()))
    answers: dict[str, Sequence[Tensor]] = {
        "tokens": found.tokens.split(lengths),
        "taps": taps.split(lengths, dim=1),
    }
    if found.merged is not None and encoder.merger is not None:
        squares = [length // encoder.merger.side**2 for length in lengths]
        answers["merged"] = found.merged.split(squares)
        if found.deepstack:
            deep = torch.stack(list(found.deepstack.values()))
            answers["deepstack"] = deep.split(squares, dim=1)
    frames = [count for count, _, _ in grid]
    prefix = found.prefix if found.prefix.shape[1] else None
    rows = {"prefix": prefix, "pooled": found.pooled, "projected": found.projected}
    return answers | {kind: row.split(frames) for kind, row in rows.items() if row is not None}


def compare_neighbours(
    encoder: Encoder, patches: Sequence[Tensor], shapes: Shapes, clean: Answers
) -> Iterator[Comparison]:
    """Check that images packed with images of NaN keep every bit of what was said without."""
    spoilt = {0, len(patches) - 2}
    dirty = [torch.full_like(x, torch.nan) if i in spoilt else x for i, x in enumerate(patches)]
    beside = ask(encoder, dirty, shapes.grid)
    worst = 0.0
    for kind, outputs in clean.items():
        for image, output in enumerate(outputs):
            if image not in spoilt:
                worst = max(worst, deviation(beside[kind][image], output))
    dtype = str(encoder.dtype).removeprefix("torch.")
    where, backend = describe_grid(shapes.grid, shapes), encoder.attention
    yield Comparison("neighbours of NaN", where, "bits", "among others", dtype, backend, worst, 0.0)


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return 0.0 if every bit is the same, else the largest difference, or infinity for NaN."""
    if torch.equal(found, expected):
        return 0.0
    largest = (found.double() - expected.double()).abs().max().item()
    return largest if largest > 0 else torch.inf
