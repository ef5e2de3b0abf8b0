"""Compare an encoder's outputs with its reference's, over shapes, packs, dtypes and backends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from math import isfinite

import torch
from torch import Tensor

from packvit.config import Table
from packvit.encoder import Encoder
from packvit.model.attention import BACKENDS
from packvit.packs.segments import Grid
from packvit.verification import LIMIT, LOWER_LIMIT, OWN_LIMIT, Comparison, VerifyOptions
from packvit.verification.references import Answers, ReferenceModel, run

SHAPES: Grid = (  # (frames, rows, columns); square grids alone would hide swapped axes
    (1, 1, 1),
    (1, 1, 23),
    (1, 19, 1),
    (1, 3, 17),
    (1, 17, 3),
    (2, 4, 6),
)
QUICK_SHAPES: Grid = ((1, 1, 1), (1, 1, 7), (1, 5, 1), (1, 3, 17), (2, 4, 6))
LARGEST = (1, 64, 64)
SQUARE = 16  # of encoders that know no size of their own


@dataclass(frozen=True, slots=True)
class Shapes:
    """The grids of one round, and whether positions are interpolated for them."""

    grid: Grid
    interpolate: bool


def plan_shapes(encoder: Encoder, options: VerifyOptions, interpolates: bool) -> list[Shapes]:
    """Return the rounds: all grids, or the encoder's own grid and then others, interpolated."""
    table = encoder.config.positions
    rows, columns = (table.rows, table.columns) if isinstance(table, Table) else (SQUARE, SQUARE)
    others = QUICK_SHAPES if options.quick else (*SHAPES, LARGEST)
    if not isinstance(table, Table) or table.any_grid:
        return [Shapes((*others, (1, rows, columns)), interpolate=False)]
    own = Shapes(((1, rows, columns), (2, rows, columns), (1, rows, columns)), interpolate=False)
    return [own, Shapes(others, interpolate=True)] if interpolates else [own]


def compare_outputs(
    encoder: Encoder, reference: ReferenceModel, options: VerifyOptions
) -> Iterator[Comparison]:
    """Yield all comparisons. `encoder` computes in float32, and is not changed.

    In float32 every image is compared, alone, among others and in reverse order. Lower precisions
    are compared over all images at once, since the rounding of a single vector is random.
    """
    rounds = plan_shapes(encoder, options, reference.family.reference.interpolates)
    packs = [draw(shapes.grid, encoder, options.seed) for shapes in rounds]
    # A GPU would round the convolutions of float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = reference.load(torch.float32, encoder.device)
        truths = [
            run(exact, patches, shapes.grid, interpolate=shapes.interpolate)
            for shapes, patches in zip(rounds, packs, strict=True)
        ]
    del exact
    for shapes, patches, truth in zip(rounds, packs, truths, strict=True):
        in_double = cache(partial(run_in_double, reference, encoder.device, patches, shapes))
        for backend in backends(encoder):
            with set_to(encoder, backend, shapes):
                yield from compare_exactly(encoder, patches, shapes, truth, in_double)
                yield from compare_neighbours(encoder, patches, shapes)
    for name in options.lower:
        dtype = getattr(torch, name)
        lowered = lower(encoder, dtype)
        rival = reference.load(dtype, encoder.device)
        for shapes, patches, truth in zip(rounds, packs, truths, strict=True):
            theirs = run(rival, patches, shapes.grid, interpolate=shapes.interpolate)
            for backend in backends(lowered):
                with set_to(lowered, backend, shapes):
                    yield from compare_errors(lowered, patches, shapes, truth, theirs)
                    yield from compare_neighbours(lowered, patches, shapes)


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


def draw(grid: Grid, encoder: Encoder, seed: int) -> list[Tensor]:
    """Return normalised patches of N(0, 1): N x [patches, P], (row, column, channel)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            frames * rows * columns,
            encoder.config.patch_dim,
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        ).to(encoder.device)
        for frames, rows, columns in grid
    ]


@torch.no_grad()
def ask(encoder: Encoder, patches: Sequence[Tensor], grid: Grid) -> Answers:
    """Return all outputs of our encoder for one pack, image by image."""
    found = encoder.encode(
        torch.cat(list(patches)),
        torch.tensor(grid, dtype=torch.int64, device="cpu"),
        taps=range(encoder.config.layers),
        projected=encoder.projection is not None,
    )
    lengths = [frames * rows * columns for frames, rows, columns in grid]
    taps = torch.stack(list(found.taps.values()))
    answers: dict[str, Sequence[Tensor]] = {
        "tokens": found.tokens.split(lengths),
        "taps": taps.split(lengths, dim=1),
    }
    frames = [count for count, _, _ in grid]
    prefix = found.prefix if found.prefix.shape[1] else None
    rows = {"prefix": prefix, "pooled": found.pooled, "projected": found.projected}
    return answers | {kind: row.split(frames) for kind, row in rows.items() if row is not None}


def run_in_double(
    reference: ReferenceModel, device: torch.device, patches: Sequence[Tensor], shapes: Shapes
) -> Answers:
    """Return the reference's outputs in float64."""
    exact = reference.load(torch.float64, device)
    return run(exact, patches, shapes.grid, interpolate=shapes.interpolate)


def compare_exactly(
    encoder: Encoder,
    patches: Sequence[Tensor],
    shapes: Shapes,
    truth: Answers,
    in_double: Callable[[], Answers],
) -> Iterator[Comparison]:
    """Compare every image in float32: alone, among others, and among them in reverse order.

    `in_double` returns the reference's outputs in float64, and is called only if a difference
    exceeds `LIMIT`: the reference's own distance to float64 may then widen the limit.
    """
    grid = shapes.grid
    alone = [ask(encoder, [one], (place,)) for one, place in zip(patches, grid, strict=True)]
    back = ask(encoder, patches[::-1], grid[::-1])
    packs = {
        "alone": {kind: [one[kind][0] for one in alone] for kind in alone[0]},
        "among others": ask(encoder, patches, grid),
        "reordered": {kind: outputs[::-1] for kind, outputs in back.items()},
    }
    for pack, answers in packs.items():
        for kind in dict.fromkeys((*truth, *answers)):
            for image, place in enumerate(grid):
                ours, theirs = (x[kind][image] if kind in x else None for x in (answers, truth))
                worst, where = scaled_difference(ours, theirs), describe_grid((place,), shapes)
                own, limit = None, LIMIT
                if worst > LIMIT and isfinite(worst):
                    own = scaled_difference(theirs, in_double()[kind][image])
                    limit = max(LIMIT, OWN_LIMIT * own)
                yield Comparison(kind, where, pack, "float32", encoder.attention, worst, limit, own)


def compare_neighbours(
    encoder: Encoder, patches: Sequence[Tensor], shapes: Shapes
) -> Iterator[Comparison]:
    """Check that images packed with images of NaN keep every bit."""
    spoilt = {0, len(patches) - 2}
    dirty = [torch.full_like(x, torch.nan) if i in spoilt else x for i, x in enumerate(patches)]
    clean, beside = (ask(encoder, some, shapes.grid) for some in (patches, dirty))
    worst = 0.0
    for kind, outputs in clean.items():
        for image, output in enumerate(outputs):
            if image not in spoilt:
                worst = max(worst, deviation(beside[kind][image], output))
    dtype = str(encoder.dtype).removeprefix("torch.")
    where = describe_grid(shapes.grid, shapes)
    yield Comparison(
        "neighbours of NaN", where, "among others", dtype, encoder.attention, worst, 0.0
    )


def compare_errors(
    encoder: Encoder, patches: Sequence[Tensor], shapes: Shapes, truth: Answers, theirs: Answers
) -> Iterator[Comparison]:
    """Compare our error in a lower precision with the reference's own, both against float32.

    Images for which the reference returns NaN are left out: in bfloat16 this happened for 5 x 1
    patches, with torch 2.11 on a CPU with AMX; the convolution is the suspect.
    """
    answers = ask(encoder, patches, shapes.grid)
    dtype, where = str(encoder.dtype).removeprefix("torch."), describe_grid(shapes.grid, shapes)
    kept = [i for i in range(len(patches)) if all(x[i].isfinite().all() for x in theirs.values())]
    if len(kept) < len(patches):
        lost = [describe_grid((p,), shapes) for i, p in enumerate(shapes.grid) if i not in kept]
        where = f"{where}, without those for which the reference returns NaN: {', '.join(lost)}"
    for kind in dict.fromkeys((*truth, *answers)):
        worst, own = torch.inf, 0.0
        if kind in truth and kind in answers and kept:
            ours, rival, exact = ([x[kind][i] for i in kept] for x in (answers, theirs, truth))
            layered = kind == "taps"
            worst, own = worst_pair(
                relative_errors(ours, exact, layered), relative_errors(rival, exact, layered)
            )
        limit = LOWER_LIMIT * own
        yield Comparison(kind, where, "among others", dtype, encoder.attention, worst, limit, own)


def describe_grid(grid: Grid, shapes: Shapes) -> str:
    """Return the images compared as text: 3 x 17, 2 frames of 4 x 6, 8 images."""
    frames, rows, columns = grid[0]
    sides = f"{rows} x {columns}" if frames == 1 else f"{frames} frames of {rows} x {columns}"
    said = sides if len(grid) == 1 else f"{len(grid)} images"
    return f"{said}, interpolated" if shapes.interpolate else said


def scaled_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Return max|ours - theirs| / max(1, max|theirs| / 4); infinite where one is missing.

    Absolute for small outputs and relative for large ones: some layers reach several hundred.
    """
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return torch.inf
    scale = max(1.0, theirs.abs().max().item() / 4)
    return (ours.double() - theirs.double()).abs().max().item() / scale


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return 0.0 if every bit is the same, else the largest difference, or infinity for NaN."""
    if torch.equal(found, expected):
        return 0.0
    largest = (found.double() - expected.double()).abs().max().item()
    return largest if largest > 0 else torch.inf


def relative_errors(found: Sequence[Tensor], truth: Sequence[Tensor], layered: bool) -> Tensor:
    """Return ‖found - truth‖ / ‖truth‖ over all images: one number, or one for each layer."""

    def norms(parts: list[Tensor]) -> Tensor:
        whole = torch.cat([x.double().flatten(1 if layered else 0) for x in parts], dim=-1)
        return torch.atleast_1d(whole.norm(dim=-1))

    apart = norms([ours - exact for ours, exact in zip(found, truth, strict=True)])
    return apart / norms(list(truth))


def worst_pair(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the errors of the layer in which ours is largest relative to theirs."""
    layer = (ours / theirs).nan_to_num(torch.inf).argmax()
    return ours[layer].item(), theirs[layer].item()
