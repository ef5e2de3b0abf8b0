"""Plan which images are encoded together in which training step. No torch.

The plan is a pure function of the images' sizes, the seed and the epoch, so every process computes
the same one without communication, and resuming is `plan[step:]`.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

EVEN_AT = (
    6144  # tokens at which attention costs as much as the rest: 6 x the width, here of AIMv2-large
)


class Share(NamedTuple):
    """The images of one pack in a step."""

    images: tuple[int, ...]
    counts: bool = (
        True  # False: repeats an image, because the last step has fewer images than shares
    )


Step = tuple[Share, ...]  # one optimizer step; process r of R runs step[r::R]


def plan_steps(
    lengths: Sequence[int],
    budget: int,
    shares: int = 1,
    *,
    seed: int = 0,
    epoch: int = 0,
    even_at: int = EVEN_AT,
) -> list[Step]:
    """Return the steps of an epoch: every image once, shuffled, in shares of about equal cost.

    A step has one share for each process, or several, whose gradients are accumulated. A share
    holds at most `budget` tokens. The cost of an image is its tokens plus the cost of attention,
    which grows with their square: an image of `even_at` tokens costs twice its tokens. Only the
    last step can have fewer images than shares. A share without image then repeats the shortest
    image of the step, since collectives need every process, and does not count.

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
    """Assign each image, longest first, to the cheapest share that it fits in.

    Returns also the images that fit in none.
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
    """Return the tokens of all shares that count, by which the step's loss is divided."""
    return sum(lengths[image] for share in step if share.counts for image in share.images)
