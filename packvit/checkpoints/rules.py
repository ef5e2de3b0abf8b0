"""How each of our parameters is written in a checkpoint: the rules of a family's table.

Each rule knows its inverse, so storing gives the checkpoint back bit for bit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

import torch
from torch import Tensor

from packvit.config import PatchOrder


@cache
def pattern(ours: str) -> re.Pattern[str]:
    """Return the pattern of the parameters that a rule's name stands for."""
    return re.compile(r"(?P<i>\d+)".join(re.escape(part) for part in ours.split("{i}")))


@dataclass(frozen=True, slots=True)
class Rule:
    """How one of our parameters is written in a checkpoint.

    `{i}` in a name stands for a layer's number. Names match whole or not at all.
    """

    ours: str
    theirs: tuple[str, ...]
    load: Callable[[Sequence[Tensor]], Tensor]
    store: Callable[[Tensor], Sequence[Tensor]]  # the exact inverse of `load`
    pairs: bool = False  # queries' and keys' rows that rotary angles turn together are neighbours

    def names(self, ours: str) -> tuple[str, ...] | None:
        """Return the checkpoint's names for our parameter `ours`, or None if it is another's."""
        match = pattern(self.ours).fullmatch(ours)
        return match and tuple(name.format(**match.groupdict()) for name in self.theirs)


def rename(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: [tensor])


def fuse(ours: str, *theirs: str, shares: Sequence[int] = ()) -> Rule:
    """One tensor of ours that stacks several of theirs: thirds for q, k and v.

    `shares` are their numbers of rows, in proportion, where they are not equal.
    """
    shares = shares or (1,) * len(theirs)

    def split(tensor: Tensor) -> list[Tensor]:
        rows = [len(tensor) * share // sum(shares) for share in shares]
        return [part.clone() for part in tensor.split(rows)]  # files cannot share storage

    return Rule(ours, theirs, lambda tensors: torch.cat(list(tensors)), split)


def alternate(ours: str, *theirs: str) -> Rule:
    """One tensor of ours that has the rows of two of theirs, or of one's two halves, in turns.

    So gate and up projection are adjacent when their product is computed.
    """

    def load(tensors: Sequence[Tensor]) -> Tensor:
        halves = tensors if len(tensors) > 1 else tensors[0].chunk(2)
        return torch.stack(list(halves), 1).flatten(0, 1)

    def store(tensor: Tensor) -> list[Tensor]:
        halves = tensor.unflatten(0, (-1, 2)).unbind(1)
        return [half.contiguous() for half in halves] if len(theirs) > 1 else [torch.cat(halves)]

    return Rule(ours, theirs, load, store)


def gated(ours: str, theirs: str, names: str) -> tuple[Rule, Rule]:
    """The weight and the bias of a gate and its up projection, of one name or of two."""

    def rule(part: str) -> Rule:
        return alternate(f"{ours}.{part}", *(f"{theirs}{name}.{part}" for name in names.split()))

    return rule("weight"), rule("bias")


def layers(ours: str, theirs: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Weights and biases of layers, whose names below `ours` and `theirs` are given in pairs.

    Several of their names, with spaces between, are stacked into one of ours. A rule for a bias
    that a model does not have is never asked for.
    """

    def rule(our: str, their: str, part: str) -> Rule:
        parts = [f"{theirs}{name}.{part}" for name in their.split()]
        return (fuse if len(parts) > 1 else rename)(f"{ours}{our}.{part}", *parts)

    return tuple(
        rule(our, their, part) for our, their in names.items() for part in ("weight", "bias")
    )


def conv_to_linear(ours: str, theirs: str, *, channels: int = 3) -> Rule:
    """A convolution whose stride is its kernel, as a linear layer over flattened patches.

    Shapes: Conv2d [D, C, p, p] <-> Linear [D, P], P ordered (row, column, channel) as our patches.
    """

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].permute(0, 2, 3, 1).flatten(1)

    def unflatten(tensor: Tensor) -> list[Tensor]:
        side = isqrt(tensor.shape[1] // channels)
        return [tensor.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2).contiguous()]

    return Rule(ours, (theirs,), flatten, unflatten)


def linear_over_channels(ours: str, theirs: str) -> Rule:
    """A linear layer over patches flattened channel first. Shapes: [D, P] <-> [D, P]."""
    return Rule(
        ours,
        (theirs,),
        lambda tensors: permute_patches(tensors[0], "chw", back=True),
        lambda tensor: [permute_patches(tensor, "chw")],
    )


def video_conv_to_linear(ours: str, theirs: str, frames: int) -> Rule:
    """A convolution over `frames` frames at once, as a linear layer over patches of them.

    Shapes: Conv3d [D, 3, frames, p, p] <-> Linear [D, P], P ordered (frame, row, column, channel).
    """

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].permute(0, 2, 3, 4, 1).flatten(1)

    def unflatten(tensor: Tensor) -> list[Tensor]:
        side = isqrt(tensor.shape[1] // (3 * frames))
        parts = tensor.unflatten(1, (frames, side, side, 3))
        return [parts.permute(0, 4, 1, 2, 3).contiguous()]

    return Rule(ours, (theirs,), flatten, unflatten)


def convolution(ours: str, theirs: str, *, frames: int = 1) -> tuple[Rule, Rule]:
    """The weight and the bias of a convolution that is a linear layer of ours.

    It reads images, or `frames` frames of a video at once.
    """
    names = (f"{ours}.weight", f"{theirs}.weight")
    weight = conv_to_linear(*names) if frames == 1 else video_conv_to_linear(*names, frames)
    return weight, rename(f"{ours}.bias", f"{theirs}.bias")


def reshape(ours: str, theirs: str, *leading: int) -> Rule:
    """A tensor that the checkpoint keeps with `leading` dimensions of 1."""
    return Rule(
        ours,
        (theirs,),
        lambda tensors: tensors[0].reshape(tensors[0].shape[len(leading) :]),
        lambda tensor: [tensor.reshape(*leading, *tensor.shape)],
    )


def bind(rules: Sequence[Rule], heads: int) -> tuple[Rule, ...]:
    """Return the rules for an encoder with `heads` heads.

    Our rotary positions turn rows k and k + K/2 of a head of K together. If a checkpoint turns
    neighbouring rows together, the rows of queries and keys are reordered.
    """

    def bound(rule: Rule) -> Rule:
        return replace(
            rule,
            load=lambda tensors: order_rows(rule.load(tensors), heads, to_halves=True),
            store=lambda tensor: rule.store(order_rows(tensor, heads, to_halves=False)),
        )

    return tuple(bound(rule) if rule.pairs else rule for rule in rules)


def neighbours(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Weights and biases of q, k and v, of one name or of three, whose angles turn neighbours."""
    return tuple(replace(rule, pairs=True) for rule in layers("", "", {ours: theirs}))


def order_rows(qkv: Tensor, heads: int, *, to_halves: bool) -> Tensor:
    """Return q, k and v, rows of q and k from pairs to halves or back. Shapes: [3 D, ...]."""
    query, key, value = qkv.chunk(3)
    parts = (-1, 2) if to_halves else (2, -1)
    turned = (
        part.unflatten(0, (heads, -1)).unflatten(1, parts).transpose(1, 2).flatten(0, 2)
        for part in (query, key)
    )
    return torch.cat([*turned, value])


def square_table(ours: str, theirs: str) -> Rule:
    """A table of positions of a square, which the checkpoint keeps as one.

    Shapes: [side, side, D] <-> [places, D].
    """

    def store(tensor: Tensor) -> list[Tensor]:
        side = isqrt(len(tensor))
        return [tensor.unflatten(0, (side, side))]

    return Rule(ours, (theirs,), lambda tensors: tensors[0].flatten(0, 1), store)


def prefixed(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
    """The same rules for a checkpoint that writes `prefix` before every name."""
    return tuple(replace(r, theirs=tuple(prefix + name for name in r.theirs)) for r in rules)


def permute_patches(weight: Tensor, order: PatchOrder, *, back: bool = False) -> Tensor:
    """Return an embedding weight for patches flattened in `order`; with `back`, the inverse.

    Shapes: [D, P], P ordered (row, column, channel) <-> [D, P], P in `order`.
    """
    if order == "hwc":
        return weight
    inner = weight.unflatten(1, (3, -1) if back else (-1, 3))
    return inner.transpose(1, 2).flatten(1)


def find(ours: str, rules: Sequence[Rule]) -> tuple[Rule, tuple[str, ...]]:
    """Return the one rule about our parameter `ours`, with the checkpoint's names for it."""
    claims = [(rule, names) for rule in rules if (names := rule.names(ours))]
    if len(claims) != 1:
        raise ValueError(f"{len(claims)} rules claim our parameter {ours}; exactly one must.")
    return claims[0]
