"""Progress of a stage for the person who waits: a bar with an ETA on a terminal, elsewhere a line a minute.

Also writes the run's events: what started, what finished, how long it took.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from puzzle.artifacts import append_event
from puzzle.ranks import Ranks

console = Console(stderr=True, highlight=False)
QUIET_SECONDS = 60  # between two lines of a stage where there is no bar


class Progress:
    """One stage's bar, and the record of its units. Where several are under way together, shares of them move it."""

    def __init__(self, bars: Bars, task: TaskID, stage: str, events: Path) -> None:
        self._bars, self._task, self._stage, self._events = bars, task, stage, events
        self._done = 0.0
        self._told = time.monotonic()

    def total(self, total: int, done: int) -> None:
        """Counts something finer than units from now on."""
        self._done = done
        self._bars.update(self._task, total=total, completed=done)

    def fraction(self, share: float, what: str = "") -> None:
        """A share of one is done."""
        self._bars.update(self._task, advance=share, what=what)
        self._tell()

    def done(self, *units: str) -> None:
        """These units are published."""
        for unit in units:
            _record(self._events, {"time": time.time(), "stage": self._stage, "event": "published", "unit": unit})
        self._done += len(units)
        self._bars.update(self._task, completed=max(self._done, self._bar.completed), what=units[-1])
        self._tell()

    @property
    def _bar(self) -> Task:
        return next(one for one in self._bars.tasks if one.id == self._task)

    def _tell(self) -> None:
        """In the place of a bar."""
        if console.is_terminal or not Ranks.current().first or time.monotonic() - self._told < QUIET_SECONDS:
            return
        self._told = time.monotonic()
        task = self._bar
        eta = "" if task.time_remaining is None else f", eta {timedelta(seconds=round(task.time_remaining))}"
        console.print(f"{self._stage:<10} {task.percentage:.0f} %{eta} {task.fields['what']}".rstrip(), soft_wrap=True)


@contextlib.contextmanager
def stage_progress(stage: str, num_units: int, events: Path) -> Iterator[Progress]:
    """Shows and records one stage; an interrupted stage leaves no ``finished`` event."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    first = Ranks.current().first
    _record(events, {"time": time.time(), "stage": stage, "event": "started", "units": num_units})
    started = time.monotonic()
    with Bars(*columns, console=console, transient=True, disable=not (console.is_terminal and first)) as bars:
        yield Progress(bars, bars.add_task(stage, total=num_units, what=""), stage, events)
    seconds = time.monotonic() - started
    _record(events, {"time": time.time(), "stage": stage, "event": "finished", "seconds": round(seconds, 3)})
    if first:
        console.print(f"{stage:<10} {num_units} unit{'s' if num_units != 1 else ''} in {seconds:.1f} s")


def _record(events: Path, event: Mapping[str, object]) -> None:
    """Only rank 0 writes events; what other ranks publish lies on disk."""
    if Ranks.current().first:
        append_event(events, event)
