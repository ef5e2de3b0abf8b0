"""Show the progress of a job on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from packvit.corpus.progress import Progress

PAUSE = 5.0  # seconds between plain lines


class Meter:
    """Keeps the first and last progress of a job, and computes its speed."""

    def __init__(self) -> None:
        self.first = Progress(0)  # rows that a resumed job starts with do not count
        self.last: Progress | None = None
        self.start = 0.0
        self.notices: list[str] = []  # said once the job begins
        self.say: Callable[[str], None] = lambda text: click.echo(text, err=True)
        self.draw: Callable[[Progress], None] = lambda progress: None

    def tell(self, progress: Progress) -> None:
        """Store a progress and show it."""
        if self.last is None:
            self.first, self.start = progress, time.monotonic()
            for note in (*self.notices, *opening(progress)):
                self.say(note)
        self.last = progress
        self.draw(progress)

    def format(self, progress: Progress) -> str:
        """Return speed, errors, shares and time left, as far as they are known."""
        settled = progress.settled - self.first.settled
        errors = f"{progress.errors:,} error{'' if progress.errors == 1 else 's'}"
        if not settled:
            return errors
        seconds = max(time.monotonic() - self.start, 1e-6)
        tokens = progress.tokens - self.first.tokens
        said = [f"{settled / seconds:,.1f} images/s", f"{tokens / seconds:,.0f} tokens/s", errors]
        shares = progress.shares
        if shares.fill:
            said += [f"decoding {shares.decoding:.0%}", f"encoding {shares.encoding:.0%}"]
            said.append(f"packs {shares.fill:.0%} full")
        rest = seconds * (progress.rows - progress.settled) / settled
        return ", ".join([*said, f"{duration(rest)} left"])


def opening(progress: Progress) -> Iterator[str]:
    """Yield notes on what a job finds when it starts."""
    yield from progress.notes
    if progress.committed:
        yield f"{progress.committed:,} of {progress.rows:,} rows are written already and are kept."


def duration(seconds: float) -> str:
    """Return a duration as text: 0.8 s, 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def show_progress() -> Iterator[Meter]:
    """Show the progress of the meter on stderr."""
    meter = Meter()
    if not sys.stderr.isatty():
        meter.draw = plain_lines(meter)
        yield meter
        return
    from rich.console import Console  # takes 0.1 s to import
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        meter.say = lambda text: bar.console.print(text, markup=False, highlight=False)
        task = bar.add_task("loading the model", total=None)

        def draw(progress: Progress) -> None:
            text = meter.format(progress)
            bar.update(task, total=progress.rows, completed=progress.settled, description=text)

        meter.draw = draw
        yield meter


def plain_lines(meter: Meter, pause: float = PAUSE) -> Callable[[Progress], None]:
    """Return a function that prints at most one line every `pause` seconds."""
    due = time.monotonic() + pause

    def draw(progress: Progress) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + pause
        click.echo(
            f"{progress.settled:,} of {progress.rows:,} images, {meter.format(progress)}",
            err=True,
        )

    return draw
