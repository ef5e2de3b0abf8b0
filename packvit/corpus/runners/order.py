"""The work of a runner, and how what others stage is entered: in the order of the shards."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packvit.corpus.encode.filling import Shard, Watch
from packvit.corpus.folder.layout import Commit, enter
from packvit.corpus.progress import Effort
from packvit.corpus.runners.embedder import Finished

TRIES = 3  # how often a shard may lose the process that embeds it


@dataclass(frozen=True, slots=True)
class Work:
    """The shards to embed, in their order, and what is done with them."""

    shards: Iterable[Shard]
    count: int  # of the shards
    folder: Path
    last_kept: int  # the last part that the log has already, or -1
    watch: Watch
    effort: Effort


# Yields the lines of the log of all shards, in their order, each when it is written.
Runner = Callable[[Work], Generator[Commit, None, None]]


def enter_all(finished: Iterator[Finished], work: Work) -> Generator[Commit, None, None]:
    """Enter parts that embedders staged, and yield their lines of the log.

    As in `run_shards`, no interrupt can cut an entry in half.

    Raises: WriteError if the disk does not take it.
    """
    with ThreadPoolExecutor(1, "packvit-commit") as writer:
        for shard in finished:
            work.effort.add(shard.effort)
            work.watch(shard.rows)
            mends = shard.number < work.last_kept
            yield writer.submit(enter, work.folder, shard.staged, mends=mends).result()


class Sequencer:
    """Puts what embedders finish in any order back into the order of the shards."""

    def __init__(self) -> None:
        self.numbers: deque[int] = deque()  # handed out and not released, in their order
        self.finished: dict[int, Finished] = {}

    def expect(self, number: int) -> None:
        """Take note that shard `number` is the next in the order."""
        self.numbers.append(number)

    def add(self, finished: Finished) -> None:
        """Take what an embedder brings."""
        self.finished[finished.number] = finished

    def release(self) -> Iterator[Finished]:
        """Yield what is finished with nothing missing before it."""
        while self.numbers and self.numbers[0] in self.finished:
            yield self.finished.pop(self.numbers.popleft())
