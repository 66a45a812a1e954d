"""Standard output of demos and benches: progress and an estimate of the time left, on a terminal or in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

READABLE = 96  # columns; longer lines of prose are hard to follow
EVERY_SECONDS = 15.0  # outside a terminal, one line of progress per interval

Advance = Callable[..., None]  # advance(count, note=""): `count` more are done; the note is shown with the progress


class Screen:
    """Live progress bars on a terminal. In logs and pipes, a line every `every` seconds and one at the end."""

    def __init__(self, every: float = EVERY_SECONDS) -> None:
        self.console = Console(highlight=False)
        self.every = every

    def say(self, line: str) -> None:
        self.console.print(Text(line, style="dim"), soft_wrap=True)

    @contextmanager
    def timed(self, phases: dict[str, float], name: str) -> Iterator[None]:
        """Record in `phases` how many seconds the block took."""
        started = time.perf_counter()
        yield
        phases[name] = time.perf_counter() - started

    @contextmanager
    def phase(self, phases: dict[str, float], name: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
        """A timed block of `total` steps. Yields `advance(count, note="")`."""
        with self.timed(phases, name):
            if self.console.is_terminal:
                with self._bar(name, total) as advance:
                    yield advance
            else:
                with self._lines(name, total, unit) as advance:
                    yield advance

    @contextmanager
    def waiting(self, phases: dict[str, float], name: str) -> Iterator[None]:
        """A timed block whose progress is unknown."""
        with self.timed(phases, name):
            if self.console.is_terminal:
                with self.console.status(name):
                    yield
            else:
                started = time.perf_counter()
                with self._repeating(lambda: f"{name}: {duration(time.perf_counter() - started)}"):
                    yield

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:>11}"),
            _TimeColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, note="")
            yield lambda count, note="": progress.update(task, advance=count, note=note)

    @contextmanager
    def _lines(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        done, latest, started = 0, "", time.perf_counter()

        def advance(count: int, note: str = "") -> None:
            nonlocal done, latest
            done, latest = done + count, note

        def line() -> str:
            told = time_told(done, total, time.perf_counter() - started)
            parts = [f"{done:,} of {total:,} {unit}", told, latest]
            return f"{name}: {', '.join(part for part in parts if part)}"

        with self._repeating(line):
            yield advance
        print(line(), flush=True)

    @contextmanager
    def _repeating(self, line: Callable[[], str]) -> Iterator[None]:
        """Print `line()` every `self.every` seconds, even during one long step."""
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(self.every):
                print(line(), flush=True)

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class _TimeColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(time_told(task.completed, task.total or 0, task.elapsed or 0.0), style="progress.remaining")


def time_told(done: float, total: float, seconds: float) -> str:
    """Elapsed time and, before the end, an estimate of the time left at the current pace."""
    if not 0 < done < total:
        return duration(seconds)
    return f"{duration(seconds)}, about {rough(seconds / done * (total - done))} left"


def duration(seconds: float) -> str:
    """Seconds in readable form: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def rough(seconds: float) -> str:
    """An estimate, rounded to a realistic precision."""
    if seconds < 120:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{round(minutes / 60)} h"
