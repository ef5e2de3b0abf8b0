"""How far a job has come, and what it did in the end. No torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from packvit.corpus.rows import Row


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job has come."""

    rows: int  # of the whole job
    settled: int = 0  # rows that are known to be ok or an error
    errors: int = 0
    tokens: int = 0
    committed: int = 0  # rows in parts that are whole
    notes: tuple[str, ...] = ()  # what was found in the folder when the job began


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished job did, and what was there of it when it was resumed.

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

    @property
    def images_per_second(self) -> float:
        """Rows by time, errors among them; those that were kept took none."""
        return (self.rows - self.kept_rows) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Patches encoded by time."""
        return (self.tokens - self.kept_tokens) / self.seconds


Tell = Callable[[Progress], None]


class Tally:
    """Counts what becomes of rows, and tells whoever watches."""

    def __init__(self, rows: int, tell: Tell | None) -> None:
        self.progress = Progress(rows)
        self.tell = tell
        self.codes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def settle(self, rows: Sequence[Row]) -> None:
        """Count rows that are ok or an error from now on, and tell of it."""
        self.count(rows)
        self.update()

    def count(self, rows: Sequence[Row]) -> None:
        """Count rows that are ok or an error, and tell nobody."""
        for row in rows:
            self.codes[row.status] += 1
            self.examples.setdefault(row.status, row.id)
        self.progress = replace(
            self.progress,
            settled=self.progress.settled + len(rows),
            errors=self.codes.total() - self.codes["ok"],
            tokens=self.progress.tokens
            + sum((row.rows or 0) * (row.columns or 0) for row in rows if row.status == "ok"),
        )

    def begin(self, notes: Sequence[str]) -> None:
        """Tell what is committed before anything is done, and what there is to say of it."""
        self.progress = replace(self.progress, committed=self.progress.settled, notes=tuple(notes))
        self.update()

    def update(self, **counts: int) -> None:
        """Set counts of the progress and tell of it."""
        self.progress = replace(self.progress, **counts)
        if self.tell:
            self.tell(self.progress)

    @property
    def errors(self) -> dict[str, int]:
        """Rows by code of error, the most frequent first, and by name among equals."""
        bad = ((code, count) for code, count in self.codes.items() if code != "ok")
        return dict(sorted(bad, key=lambda item: (-item[1], item[0])))
