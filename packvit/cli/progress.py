"""How far a job has come, on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from packvit.corpus.progress import Progress

PAUSE = 5.0  # seconds between plain lines


class Meter:
    """Remembers the last progress it was told of, and how fast the job has been since the first."""

    def __init__(self) -> None:
        self.first = Progress(0)  # what a resumed job begins with took no time
        self.last: Progress | None = None
        self.start = 0.0
        self.say: Callable[[str], None] = lambda text: click.echo(text, err=True)
        self.draw: Callable[[Progress], None] = lambda progress: None

    def tell(self, progress: Progress) -> None:
        """Take note of a progress and show it."""
        if self.last is None:
            self.first, self.start = progress, time.monotonic()
            for note in opening(progress):
                self.say(note)
        self.last = progress
        self.draw(progress)

    def describe(self, progress: Progress) -> str:
        """Say what is known: no speed before the first image, nothing of packs before the first."""
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
    """Yield what there is to say of what a job finds when it begins."""
    yield from progress.notes
    if progress.committed:
        yield f"{progress.committed:,} of {progress.rows:,} rows are written already and are kept."


def duration(seconds: float) -> str:
    """Return a time as a person would say it: 0.8 s, 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def show_progress() -> Iterator[Meter]:
    """Show on stderr whatever the meter is told."""
    meter = Meter()
    if not sys.stderr.isatty():
        meter.draw = plain_lines(meter)
        yield meter
        return
    from rich.console import Console  # takes 0.1 s, which `--help` need not wait for
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        meter.say = lambda text: bar.console.print(text, markup=False, highlight=False)
        task = bar.add_task("loading the model", total=None)

        def draw(progress: Progress) -> None:
            text = meter.describe(progress)
            bar.update(task, total=progress.rows, completed=progress.settled, description=text)

        meter.draw = draw
        yield meter


def plain_lines(meter: Meter, pause: float = PAUSE) -> Callable[[Progress], None]:
    """Return what prints a line every `pause` seconds at most, not for every pack."""
    due = time.monotonic() + pause

    def draw(progress: Progress) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + pause
        click.echo(
            f"{progress.settled:,} of {progress.rows:,} images, {meter.describe(progress)}",
            err=True,
        )

    return draw
