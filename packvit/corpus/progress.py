"""The progress of a job, and the summary at its end. No torch."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from packvit.corpus.folder.rows import Row


@dataclass(slots=True)
class Effort:
    """Time spent so far: the seconds each stage was busy, and the packs that were filled.

    The stages run at the same time. `decoding` is the mean over the workers, or the GPU decoder's
    time if that is longer; with several embedding processes, seconds are their mean.
    """

    decoding: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    packs: int = 0
    tokens: int = 0  # in the packs
    on_gpu: int = 0  # images that were decoded there
    reused: int = 0  # rows that were taken over from other folders

    def since(self, before: "Effort", processes: int) -> "Effort":
        """Return what was spent since `before`; seconds are divided by the number of processes."""
        return Effort(
            (self.decoding - before.decoding) / processes,
            (self.encoding - before.encoding) / processes,
            (self.writing - before.writing) / processes,
            self.packs - before.packs,
            self.tokens - before.tokens,
            self.on_gpu - before.on_gpu,
            self.reused - before.reused,
        )

    def add(self, spent: "Effort") -> None:
        """Add the effort of a process."""
        self.decoding += spent.decoding
        self.encoding += spent.encoding
        self.writing += spent.writing
        self.packs += spent.packs
        self.tokens += spent.tokens
        self.on_gpu += spent.on_gpu
        self.reused += spent.reused


@dataclass(frozen=True, slots=True)
class Shares:
    """The share of the time that each stage was busy, and how full the packs were: 0 to 1.

    The stages run at the same time, so the slowest is near 1 and the others wait for it.
    """

    decoding: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    fill: float = 0.0  # tokens of the packs, by what they may hold

    @classmethod
    def of(cls, effort: Effort, seconds: float, budget: int) -> "Shares":
        """Return the shares for `seconds` of work and packs of `budget` tokens."""
        spent = (effort.decoding, effort.encoding, effort.writing)
        decoding, encoding, writing = (min(1.0, part / max(seconds, 1e-9)) for part in spent)
        fill = effort.tokens / (effort.packs * budget) if effort.packs else 0.0
        return cls(decoding, encoding, writing, fill)

    @property
    def slowest(self) -> str:
        """The stage that was busy longest."""
        return max(("decoding", "encoding", "writing"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job, in rows."""

    rows: int  # of the whole job
    settled: int = 0  # rows whose status is known
    errors: int = 0
    tokens: int = 0
    committed: int = 0  # rows in parts that are whole
    notes: tuple[str, ...] = ()  # what was found in the folder when the job began
    shares: Shares = Shares()


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished job did, and how much of it existed when it was resumed.

    `seconds` is the time of embedding, without loading the model.
    """

    folder: str
    model: str
    fingerprint: str
    rows: int
    ok: int
    errors: dict[str, int]  # by code
    examples: dict[str, str]  # one id by code
    ignored: int  # files passed over for their suffix
    tokens: int
    seconds: float
    kept_rows: int = 0  # of `rows`, those that were committed before
    kept_tokens: int = 0
    shares: Shares = Shares()
    halved: int = 0  # packs that were split for lack of memory
    passed_over: dict[str, int] = field(default_factory=dict)  # of `ignored`, by suffix
    on_gpu: int | None = None  # images that were decoded there, where that was asked for
    reused: int = 0  # rows that were taken over from other folders

    @property
    def images_per_second(self) -> float:
        """Rows per second, errors included, kept rows excluded."""
        return (self.rows - self.kept_rows) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Patches encoded per second."""
        return (self.tokens - self.kept_tokens) / self.seconds


Tell = Callable[[Progress], None]


class Tally:
    """Counts the rows by status, and reports progress."""

    def __init__(self, rows: int, tell: Tell | None, budget: int = 1) -> None:
        self.progress = Progress(rows)
        self.tell = tell
        self.budget = budget  # tokens that a pack may hold
        self.effort = Effort()
        self.start = time.perf_counter()
        self.codes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def settle(self, rows: Sequence[Row]) -> None:
        """Count finished rows and report progress."""
        self.count(rows)
        self.update()

    def count(self, rows: Sequence[Row]) -> None:
        """Count finished rows without reporting."""
        for row in rows:
            self.codes[row.status] += 1
            self.examples.setdefault(row.status, row.id)
        self.progress = replace(
            self.progress,
            settled=self.progress.settled + len(rows),
            errors=self.codes.total() - self.codes["ok"],
            tokens=self.progress.tokens + sum(row.patches for row in rows if row.status == "ok"),
        )

    def begin(self, notes: Sequence[str]) -> None:
        """Report what is committed before any work is done, with notes on what was found."""
        self.start = time.perf_counter()
        self.progress = replace(self.progress, committed=self.progress.settled, notes=tuple(notes))
        self.update()

    def update(self, **counts: int) -> None:
        """Set counts of the progress and report it."""
        shares = Shares.of(self.effort, self.seconds, self.budget)
        self.progress = replace(self.progress, shares=shares, **counts)
        if self.tell:
            self.tell(self.progress)

    @property
    def seconds(self) -> float:
        """The time since the job began."""
        return time.perf_counter() - self.start

    @property
    def errors(self) -> dict[str, int]:
        """Rows by error code, most frequent first, then by name."""
        bad = ((code, count) for code, count in self.codes.items() if code != "ok")
        return dict(sorted(bad, key=lambda item: (-item[1], item[0])))
