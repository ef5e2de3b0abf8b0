"""The rule by which outputs pass: beside float64 they are hardly further off than the reference's.

`packvit verify`, `packvit bench` and the tests all ask `judge`. Why the numbers are what they are,
what slips through and how seldom it errs: docs/numerics.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RMS_TIMES = 1.2  # our root mean square error, as a multiple of the reference's own
LARGEST_TIMES = 2.0  # and our largest error
# What is right however exact the reference is, in units of roundoff * sqrt(1 + blocks): roundings
# add up as squares do. In 16 bits libraries sum in float32, so there are fewer of them.
FLOOR = {torch.float32: 10.0, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 100.0}
# Of the largest error, as a multiple of FLOOR: trained models have channels of 14 times the rest.
LARGEST_FLOOR = 20.0

Measure = Literal["rms", "largest"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """An error of ours beside its limit.

    Units: multiples of the root mean square of what float64 says.
    """

    measure: Measure
    worst: float
    limit: float
    own: float  # the reference's error

    @property
    def passed(self) -> bool:
        """Whether ours is within the limit, which a NaN never is."""
        return self.worst <= self.limit

    @property
    def used(self) -> float:
        """The part of the limit that is used up; infinite for a NaN."""
        share = self.worst / self.limit if self.limit else math.inf * bool(self.worst)
        return math.inf if math.isnan(share) else share


def judge(
    ours: Sequence[Tensor] | None,
    theirs: Sequence[Tensor] | None,
    truth: Sequence[Tensor] | None,
    *,
    dtype: torch.dtype,
    blocks: int,
) -> tuple[Judgement, Judgement]:
    """Return the root mean square and the largest of our errors, each beside its limit.

    One output of several images: what we and the reference make in `dtype` of the same inputs and
    weights, and what the reference makes of them in float64, behind `blocks` blocks. Take images
    enough for some 256 tokens or vectors: with fewer the two root mean squares differ by chance.

    Shapes: 3 x N x [..., D], of any one shape for each image.
    """
    floor = floor_of(dtype, blocks)
    found = None if truth is None else errors(ours, truth)
    own = None if truth is None else errors(theirs, truth)
    limits = (RMS_TIMES, floor), (LARGEST_TIMES, LARGEST_FLOOR * floor)
    names: tuple[Measure, Measure] = ("rms", "largest")
    judged = []
    for place, (name, (times, least)) in enumerate(zip(names, limits, strict=True)):
        theirs_off = own[place] if own else 0.0
        limit = max(least, times * theirs_off)
        judged.append(Judgement(name, found[place] if found else math.inf, limit, theirs_off))
    return judged[0], judged[1]


def judge_layers(
    ours: Sequence[Tensor] | None,
    theirs: Sequence[Tensor] | None,
    truth: Sequence[Tensor] | None,
    *,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Judgement]]:
    """Yield (layer, judgement) of every layer, each by itself. Shapes: 3 x N x [layers, ..., D]."""
    layers = len(truth[0]) if truth else 1
    for layer in range(layers):
        parts = (
            None if x is None else [image[layer] for image in x] for x in (ours, theirs, truth)
        )
        for judged in judge(*parts, dtype=dtype, blocks=layer + 1):
            yield layer, judged


def floor_of(dtype: torch.dtype, blocks: int) -> float:
    """Return the root mean square error that passes however exact the reference is."""
    return FLOOR[dtype] * torch.finfo(dtype).eps / 2 * math.sqrt(1 + blocks)


def errors(found: Sequence[Tensor] | None, truth: Sequence[Tensor]) -> tuple[float, float] | None:
    """Return root mean square and largest of found - truth, by the root mean square of truth.

    None where something is missing or has another shape.
    """
    if found is None or [x.shape for x in found] != [x.shape for x in truth]:
        return None
    squares = scale = numbers = largest = 0.0
    for ours, exact in zip(found, truth, strict=True):
        exact = exact.double()
        apart = (ours.detach().to(exact.device).double() - exact).abs()
        if not apart.numel():
            continue
        squares += apart.square().sum().item()
        scale += exact.square().sum().item()
        numbers += apart.numel()
        most = apart.max().item()
        largest = most if math.isnan(most) else max(largest, most)
    unit = math.sqrt(scale / numbers) if scale else 1.0
    return math.sqrt(squares / max(numbers, 1)) / unit, largest / unit
