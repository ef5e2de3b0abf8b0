"""Whether a contender's tokens are right: only such ones are timed."""

import copy

import torch
from torch import Tensor

from packvit.bench.contenders import Subject
from packvit.bench.ours import Ours
from packvit.bench.peers import Peer
from packvit.verification import running
from packvit.verification.rule import judge

# The most that ‖tokens - the baseline's‖ / ‖the baseline's‖ may be over the whole pack. Through the
# 24 layers of AIMv2-large in bf16 two right answers are 0.012 apart (on a CPU); swapped axes, or
# channels, move tokens by tenths.
LIMITS = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}
# Tokens of the smallest images, which the baseline computes in float64 too: the rule of `packvit
# verify` judges by them, with the baseline as the reference.
JUDGED_TOKENS = 512


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
        said = running.run(model, patches, grid, interpolate=interpolates)
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
    """Return the largest and the relative difference from the baseline's tokens."""
    off = tokens - truth
    return {
        "largest_scaled_difference": (off.abs().max() / max(1.0, truth.abs().max() / 4)).item(),
        "relative_difference": (off.norm() / truth.norm()).item(),
    }
