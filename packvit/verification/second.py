"""Check the reference itself: do its images influence each other, and does timm agree?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packvit.config import Table
from packvit.encoder import Encoder
from packvit.packs.grid import Grid
from packvit.verification import Comparison, VerifyOptions
from packvit.verification.answers import Answers
from packvit.verification.comparison import ask, deviation
from packvit.verification.drawing import Shapes, describe_grid, draw, plan_shapes, repeated
from packvit.verification.references import ReferenceModel, tower
from packvit.verification.rule import judge, judge_layers
from packvit.verification.running import inputs, last_state, run
from packvit.verification.timm_models import described, timm_model
from packvit.verification.timm_reference import is_timm

KINDS = ("tokens", "taps", "prefix")  # of what timm says
NEIGHBOURS = "neighbours in the reference"
OF_TIMM = "of timm beside transformers'"
LEAKS = "an image changes its neighbour in the reference's own model, which was run one by one"
DIFFER = "transformers and timm differ on the same weights: at least one of them is wrong"


@torch.no_grad()
def compare_leak(
    model: nn.Module, patches: Sequence[Tensor], rows: int, columns: int
) -> Comparison:
    """Run one image beside each of two others: its tokens must keep every bit.

    Shapes: patches 3 x [rows * columns, P], normalised, in the order (row, column, channel).
    """
    looking = tower(model)
    first, *others = (inputs(looking, image, rows, columns) for image in patches)
    said = []
    for other in others:
        both: Mapping[str, Any] = {name: torch.cat([first[name], other[name]]) for name in first}
        state = last_state(looking, both).flatten(0, -2)
        said.append(state[: len(state) // 2])
    worst = deviation(said[0], said[1])
    library, owner = ("timm", "timm's") if is_timm(model) else ("transformers", "transformers'")
    where = f"{owner} {type(model).__name__}, {rows} x {columns}"
    return Comparison(NEIGHBOURS, where, "bits", "among others", "float32", library, worst, 0.0)


def compare_reference_neighbours(
    encoder: Encoder, reference: ReferenceModel, options: VerifyOptions
) -> Comparison:
    """Check that the reference's own images do not influence each other."""
    table, merger = encoder.config.positions, encoder.config.merger
    rows, columns = (4, 6) if merger is None else (2 * merger.side, 3 * merger.side)
    if isinstance(table, Table) and not table.any_grid:
        rows, columns = table.rows, table.columns
    patches = draw(((1, rows, columns),) * 3, encoder, options.seed)
    return compare_leak(reference.load(torch.float32, encoder.device), patches, rows, columns)


def agreed_shapes(encoder: Encoder, options: VerifyOptions) -> Shapes:
    """Return the images that timm gives the same positions as transformers.

    timm antialiases every table that it resizes, and transformers some.
    """
    table = encoder.config.positions
    planned = plan_shapes(encoder, options, interpolates=False)[0]
    if isinstance(table, Table) and not (table.any_grid and "antialias" in table.resize):
        return Shapes(repeated(((1, table.rows, table.columns),)), interpolate=False)
    return planned


def compare_with_timm(
    encoder: Encoder, reference: ReferenceModel, options: VerifyOptions
) -> tuple[str, list[Comparison]]:
    """Return timm's class, and the comparisons of ours with it and of it with transformers.

    Raises: NoCounterpartError where timm has no such model; ImportError without timm.
    """
    exact = timm_model(encoder, torch.float64)
    shapes = agreed_shapes(encoder, options)
    patches = draw(shapes.grid, encoder, options.seed)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = run(timm_model(encoder, torch.float32), patches, shapes.grid)
        truth = run(exact, patches, shapes.grid)
        first, first_exact = (
            run(reference.load(dtype, encoder.device), patches, shapes.grid)
            for dtype in (torch.float32, torch.float64)
        )
    ours = ask(encoder, patches, shapes.grid)
    rows = [*judged("beside timm", encoder.attention, encoder, shapes, (ours, theirs, truth))]
    rows += judged(OF_TIMM, "timm", encoder, shapes, (theirs, first, first_exact))
    return described(exact), rows


def judged(
    how: str,
    backend: str,
    encoder: Encoder,
    shapes: Shapes,
    answers: tuple[Answers, Answers, Answers],
) -> Iterator[Comparison]:
    """Judge tokens, taps and prefix, each over all images of one shape."""
    blocks = encoder.config.layers
    for group in shapes.groups():
        grid: Grid = tuple(shapes.grid[image] for image in group)
        where = describe_grid(grid, shapes)
        for kind in (x for x in KINDS if x in answers[0] and x in answers[1]):
            given = [[said[kind][image] for image in group] for said in answers]
            found = (
                (one for _, one in judge_layers(*given, dtype=torch.float32))
                if kind == "taps"
                else judge(*given, dtype=torch.float32, blocks=blocks)
            )
            worst = {}
            for one in found:
                if one.measure not in worst or one.used > worst[one.measure].used:
                    worst[one.measure] = one
            for measure, one in worst.items():
                numbers = (one.worst, one.limit, one.own)
                yield Comparison(
                    f"{kind} {how}", where, measure, "among others", "float32", backend, *numbers
                )


def doubts(rows: Sequence[Comparison]) -> list[str]:
    """Return what the missed comparisons say against the references themselves."""
    missed = [row.what for row in rows if not row.passed]
    found = [LEAKS] if NEIGHBOURS in missed else []
    return found + ([DIFFER] if any(what.endswith(OF_TIMM) for what in missed) else [])
