"""Which images are forwarded together in which step: a plan that all processes work out alike.

The plan is a pure function of the images' sizes, the seed and the epoch, so nothing is sent
between processes, and resuming is `plan[step:]`. No torch.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

EVEN_AT = (
    6144  # tokens at which attention costs what the rest does: 6 x the width, here AIMv2-large's
)


class Share(NamedTuple):
    """What is forwarded at once: one pack."""

    images: tuple[int, ...]
    counts: bool = True  # False: a stand-in, because the last images are fewer than the shares


Step = tuple[Share, ...]  # between two of the optimizer's; process r of R forwards step[r::R]


def plan_steps(
    lengths: Sequence[int],
    budget: int,
    shares: int = 1,
    *,
    seed: int = 0,
    epoch: int = 0,
    even_at: int = EVEN_AT,
) -> list[Step]:
    """Return an epoch's steps: every image once, shuffled, in shares of about the same cost.

    A step has as many shares as there are processes, or a multiple of that, whose gradients are
    accumulated. A share holds at most `budget` tokens. Cost is tokens plus what attention adds,
    which grows with the square of an image's tokens: an image of `even_at` counts twice its tokens.
    Only in the last step can images be fewer than shares. Those that get none repeat the shortest
    image of the step, since collectives need every process, and do not count.

    Units: `lengths` and `budget` count tokens.
    Raises: ValueError for no images, or for one that no share could hold.
    """
    if not lengths or shares < 1:
        raise ValueError(
            f"There are {len(lengths)} images and {shares} shares, but a plan needs at least one "
            "of each."
        )
    for image, length in enumerate(lengths):
        if not 1 <= length <= budget:
            raise ValueError(
                f"Image {image} has {length} tokens, but a share holds 1 to {budget}. Raise the "
                "budget, or resize the image to fewer patches."
            )
    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    order.reverse()  # taken from the end
    steps = []
    while order:
        room, drawn = shares * budget, []
        while order and lengths[order[-1]] <= room:
            drawn.append(order.pop())
            room -= lengths[drawn[-1]]
        step, left = _share_out(drawn, lengths, budget, shares, even_at)
        order += reversed(left)
        steps.append(step)
    return steps


def _share_out(
    drawn: list[int], lengths: Sequence[int], budget: int, shares: int, even_at: int
) -> tuple[Step, list[int]]:
    """Give each image, longest first, to the share of least cost that has room for it.

    Those for which none has room are handed back.
    """
    members: list[list[int]] = [[] for _ in range(shares)]
    costs, tokens, left = [0.0] * shares, [0] * shares, []
    for image in sorted(drawn, key=lambda image: (-lengths[image], image)):
        length = lengths[image]
        fitting = [share for share in range(shares) if tokens[share] + length <= budget]
        if not fitting:
            left.append(image)
            continue
        least = min(fitting, key=costs.__getitem__)
        members[least].append(image)
        tokens[least] += length
        costs[least] += length * (1 + length / even_at)
    again = (min(drawn, key=lengths.__getitem__),)
    return tuple(Share(tuple(m)) if m else Share(again, counts=False) for m in members), left


def count_tokens(step: Step, lengths: Sequence[int]) -> int:
    """Return the tokens of all shares that count: what the step's loss is divided by."""
    return sum(lengths[image] for share in step if share.counts for image in share.images)
