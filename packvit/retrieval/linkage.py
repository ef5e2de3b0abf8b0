"""Groups in which every pair is alike: complete linkage, over the pairs that reach a threshold.

A chain, of which only neighbours are alike, does not become one group.
"""

from collections import defaultdict
from heapq import heapify, heappop, heappush

from packvit.retrieval.pairs import Pairs


def group_pairs(pairs: Pairs) -> list[list[int]]:
    """Return groups of two or more rows, each row in at most one, in ascending order.

    The two groups whose least similar pair is most alike are joined, again and again, while that
    pair is among `pairs`. Equal ones are joined in the order of their first rows.
    """
    groups: list[list[int]] = []
    for links in components(pairs):
        groups += join(links)
    return sorted(groups)


Links = dict[int, dict[int, float]]  # cosines by both rows, or by both groups' first rows


def components(pairs: Pairs) -> list[Links]:
    """Return the pairs of each set of rows that they connect; one is worked on at a time."""
    parent: dict[int, int] = {}

    def find(row: int) -> int:
        while (above := parent.setdefault(row, row)) != row:
            parent[row] = parent[above]
            row = above
        return row

    left, right, scores = pairs.left.tolist(), pairs.right.tolist(), pairs.scores.tolist()
    for a, b in zip(left, right, strict=True):
        first, second = find(a), find(b)
        parent[max(first, second)] = min(first, second)
    found: dict[int, Links] = defaultdict(lambda: defaultdict(dict))
    for a, b, score in zip(left, right, scores, strict=True):
        links = found[find(a)]
        links[a][b] = links[b][a] = score
    return list(found.values())


def join(links: Links) -> list[list[int]]:
    """Return the groups of connected rows; `links` is used up."""
    members = {row: [row] for row in links}
    queue = [(-score, a, b) for a, others in links.items() for b, score in others.items() if a < b]
    heapify(queue)
    while queue:
        score, a, b = heappop(queue)
        if a not in links or links[a].get(b) != -score:
            continue  # one of the two has grown since
        mine, theirs = links.pop(a), links.pop(b)
        members[a] += members.pop(b)
        joined = {}
        for other in mine.keys() | theirs.keys():
            if other in (a, b):
                continue
            links[other].pop(a, None)
            links[other].pop(b, None)
            if other in mine and other in theirs:
                joined[other] = links[other][a] = min(mine[other], theirs[other])
                heappush(queue, (-joined[other], min(a, other), max(a, other)))
        links[a] = joined
    return [sorted(rows) for rows in members.values() if len(rows) > 1]
