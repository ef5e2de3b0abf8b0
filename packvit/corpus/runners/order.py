"""The work of a runner, and committing staged parts in the order of the shards."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from packvit.corpus.encode.filling import Shard, Watch
from packvit.corpus.folder.layout import Commit, enter
from packvit.corpus.folder.stores import Folder
from packvit.corpus.progress import Effort
from packvit.corpus.runners.embedder import Finished

TRIES = 3  # how often a shard may lose the process that embeds it


@dataclass(frozen=True, slots=True)
class Work:
    """The shards to embed, in order, and where their parts and rows go."""

    shards: Iterable[Shard]
    count: int  # of the shards
    folder: Folder
    last_kept: int  # the highest part number in the log already, or -1
    watch: Watch
    effort: Effort


# Yields the log lines of all shards in order, each when it is written.
Runner = Callable[[Work], Generator[Commit, None, None]]


def enter_all(finished: Iterator[Finished], work: Work) -> Generator[Commit, None, None]:
    """Commit parts that embedders staged, and yield their log lines.

    As in `run_shards`, no interrupt cuts a commit short.

    Raises: WriteError if a part cannot be written.
    """
    with ThreadPoolExecutor(1, "packvit-commit") as writer:
        for shard in finished:
            work.effort.add(shard.effort)
            work.watch(shard.rows)
            mends = shard.number <= work.last_kept
            yield writer.submit(enter, work.folder, shard.staged, mends=mends).result()


class Sequencer:
    """Puts finished shards back into order."""

    def __init__(self) -> None:
        self.numbers: deque[int] = deque()  # sent and not released, in order
        self.finished: dict[int, Finished] = {}

    def expect(self, number: int) -> None:
        """Add shard `number` to the end of the order."""
        self.numbers.append(number)

    def add(self, finished: Finished) -> None:
        """Store a finished shard."""
        self.finished[finished.number] = finished

    def release(self) -> Iterator[Finished]:
        """Yield the finished shards that have no unfinished shard before them."""
        while self.numbers and self.numbers[0] in self.finished:
            yield self.finished.pop(self.numbers.popleft())
