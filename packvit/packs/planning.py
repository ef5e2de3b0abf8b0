"""Group images into packs of at most a number of tokens. Plain Python without torch."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

PLAN_VERSION = 1  # raise it when the same lengths give other packs; part of a job's fingerprint
WINDOW = 4  # budgets of tokens kept waiting: 39 MB of patches at the defaults, and 99 % full packs


def plan_packs(lengths: Iterable[int], budget: int, *, lookahead: int = 256) -> Iterator[list[int]]:
    """Yield packs of indices into `lengths` whose tokens sum to at most `budget`.

    Each pack starts with the image that has waited longest, so every image is packed in time, and
    then repeatedly takes the longest image that still fits. Two neighbouring packs always
    exceed one budget together, so k packs hold more than (k - 1) / 2 budgets of tokens.

    The stream is read lazily: an image is taken in only while fewer than `lookahead` images and
    fewer than 4 budgets of tokens wait, so that large images do not fill the memory. The same
    lengths give the same packs on every machine; the indices within a pack ascend.

    Units: `lengths` and `budget` count tokens; `lookahead` counts images.
    Raises: ValueError for an image larger than a pack.
    """
    if lookahead < 1:
        raise ValueError(
            f"lookahead is {lookahead}, but plan_packs must see at least 1 image at a time."
        )
    arrivals = enumerate(lengths)
    waiting: list[tuple[int, int]] = []  # (length, index), shortest first
    tokens = 0  # of the images in `waiting`

    def refill() -> None:
        nonlocal tokens
        while len(waiting) < lookahead and tokens < WINDOW * budget:
            index, length = next(arrivals, (-1, 0))
            if index < 0:
                return
            if not 1 <= length <= budget:
                raise ValueError(
                    f"Image {index} has {length} tokens, but a pack holds 1 to {budget}. "
                    "Raise the budget, or resize the image to fewer patches."
                )
            insort(waiting, (length, index))
            tokens += length

    refill()
    while waiting:
        pack, left = [], budget
        taken = min(range(len(waiting)), key=lambda place: waiting[place][1])
        while taken >= 0:
            length, index = waiting.pop(taken)
            pack.append(index)
            left -= length
            tokens -= length
            refill()
            taken = bisect_left(waiting, (left + 1, 0)) - 1  # the longest that fits, or -1
        yield sorted(pack)
