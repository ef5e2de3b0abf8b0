"""A checkpoint's tensors to an encoder's parameters and back, by the rules of its layout.

Loading walks over our own parameters and is strict both ways: every parameter is filled, every
tensor of the checkpoint is read, carried or skipped by name.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Size, Tensor

from packvit.checkpoints.errors import CheckpointError
from packvit.checkpoints.files import Checkpoint
from packvit.checkpoints.layouts import Layout
from packvit.checkpoints.rules import Rule, find

READERS = 4  # threads that read tensors: reading, checking and copying one leave Python free


class Read(NamedTuple):
    """A checkpoint's tensors by what is done with them."""

    state: dict[str, Tensor]  # our parameters
    carried: dict[str, Tensor]  # by our labels: kept for writing, and used by nothing
    skipped: tuple[str, ...]  # the checkpoint's names of those that belong to another tower


def take(
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    place: Callable[[Tensor], Tensor] | None,
) -> Read:
    """Sort a checkpoint's tensors by what is done with them; `place` is as in `load`.

    Raises: CheckpointError as `load`, and for carried numbers that are not the family's.
    """
    tensors, carried = checkpoint.tensors, layout.carried

    state = load(
        {name: tensor.shape for name, tensor in parameters.items()},
        tensors,
        layout.rules,
        unread=lambda name: name in carried.values() or layout.skips(name),
        place=place,
    )
    read = {name for ours in parameters for name in find(ours, layout.rules)[1]}
    unread = {label: name for label, name in carried.items() if name in tensors.keys() - read}
    for label in layout.known.keys() & unread.keys():
        check_known(unread[label], tensors[unread[label]], layout.known[label])
    return Read(
        state,
        {label: tensors[name].clone() for label, name in unread.items()},
        tuple(name for name in sorted(tensors) if layout.skips(name)),
    )


def check_known(name: str, tensor: Tensor, known: Sequence[float]) -> None:
    """Refuse a carried tensor of other numbers than `known`, rounded to bfloat16 or not.

    Raises: CheckpointError.
    """
    if tensor.is_meta:
        return
    held = tensor.flatten().tolist()
    if len(held) != len(known) or any(
        not abs(number - right) <= 2**-8 * abs(right)
        for number, right in zip(held, known, strict=True)
    ):
        raise CheckpointError(f"{name} holds {held}; packvit knows {list(known)}.")


class ReadParameter(NamedTuple):
    """What was read for one of our parameters."""

    names: tuple[str, ...]  # the checkpoint's
    problems: list[str]
    tensor: Tensor | None = None


def load(
    shapes: Mapping[str, Size],
    checkpoint: Mapping[str, Tensor],
    rules: Sequence[Rule],
    *,
    unread: Callable[[str], bool] = lambda name: False,
    place: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return a tensor for every one of our parameters, read from `checkpoint`.

    `unread` says which of the checkpoint's names may stay unread; `place` takes each tensor to its
    device and dtype as soon as it is read, so that the host never holds the model twice. Without
    `place` every number stays as it is, and so tensors that are stacked must be of one dtype.

    Raises: CheckpointError listing everything that does not fit, so that one run shows it all.
    """

    def read_one(ours: str, shape: Size) -> ReadParameter:
        rule, names = find(ours, rules)
        if absent := [name for name in names if name not in checkpoint]:
            return ReadParameter(names, [f"missing: {', '.join(absent)} (our {ours})"])
        wanted = [
            part.shape
            for part in rule.store(torch.empty(shape, dtype=torch.float32, device="meta"))
        ]
        tensors = [checkpoint[name] for name in names]
        found = misfits(names, tensors, wanted)
        if place is None and len({tensor.dtype for tensor in tensors}) > 1:
            held = ", ".join(f"{n} {t.dtype}" for n, t in zip(names, tensors, strict=True))
            found.append(f"of different dtypes, but one tensor of ours: {held}")
        elif all(tensor.shape == part for tensor, part in zip(tensors, wanted, strict=True)):
            return ReadParameter(
                names, found, place(rule.load(tensors)) if place else rule.load(tensors)
            )
        return ReadParameter(names, found)

    state, read, problems = {}, set(), []
    with ThreadPoolExecutor(READERS, "packvit-read") as readers:
        for ours, one in zip(
            shapes, readers.map(read_one, shapes.keys(), shapes.values()), strict=True
        ):
            read.update(one.names)
            problems += one.problems
            if one.tensor is not None:
                state[ours] = one.tensor
    problems += [
        f"unexpected: {name}" for name in sorted(set(checkpoint) - read) if not unread(name)
    ]
    if problems:
        raise CheckpointError(
            "The checkpoint does not fit the model that its config.json describes:\n  "
            + "\n  ".join(problems)
        )
    return state


def misfits(names: Sequence[str], tensors: Sequence[Tensor], wanted: Sequence[Size]) -> list[str]:
    """Return which tensors have another shape than wanted or are not floating point, in words."""
    problems = []
    for name, tensor, shape in zip(names, tensors, wanted, strict=True):
        if tensor.shape != shape:
            problems.append(f"misshapen: {name} is {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"not floating point: {name} holds {tensor.dtype}")
    return problems


def store(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Write our parameters in the checkpoint's layout: the inverse of `load`."""
    checkpoint = {}
    for ours, tensor in state.items():
        rule, names = find(ours, rules)
        checkpoint.update(zip(names, rule.store(tensor), strict=True))
    return checkpoint
