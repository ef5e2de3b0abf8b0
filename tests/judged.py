"""What an encoder says beside its reference, by the rule that `packvit verify` goes by."""

import copy
from typing import Any

import reference
from torch import Tensor

from packvit.packs.features import Features
from packvit.verification.rule import judge


def misses(
    found: Features, model: Any, patches: Tensor, grid: list[tuple[int, int, int]], **options: Any
) -> list[str]:
    """Return in words what in `found` is further from float64 than `model` allows.

    `model` is transformers', in the precision of `found`; `options` are its forward's.
    """
    patches = patches.to(next(model.parameters()).dtype)
    theirs = reference.run(model, patches, grid, **options)
    truth = reference.run(copy.deepcopy(model).double(), patches, grid, **options)
    blocks = len(theirs.hidden_states)
    outputs = {
        name: (getattr(found, name), getattr(theirs, name), getattr(truth, name), blocks)
        for name in ("tokens", "prefix", "pooled", "projected")
        if getattr(theirs, name) is not None
    }
    for layer, tap in found.taps.items():
        both = theirs.hidden_states[layer], truth.hidden_states[layer]
        outputs[f"tap {layer}"] = (tap, *both, layer + 1)
    missed = []
    for name, (ours, own, exact, depth) in outputs.items():
        given = ([x] if x is not None else None for x in (ours, own, exact))
        for judged in judge(*given, dtype=found.tokens.dtype, blocks=depth):
            if not judged.passed:
                missed.append(f"{name}: {judged}")
    return missed
