"""The end of a run: one page, from the solution, the evaluation, the export and what led there. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts
from puzzle.run import Run

if TYPE_CHECKING:
    from puzzle.plans import Planned
    from puzzle.progress import Progress
    from puzzle.report.contents import Left

NAME = "report.html"


def make_report(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Publishes the page beside the student, and as the run's own."""
    (unit,) = missing

    def write(aside: Path) -> Mapping[str, Any]:
        (aside / NAME).write_text(write_page(run), encoding="utf-8")
        return {}

    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(str(unit.path))


def write_page(run: Run, left: Sequence[Left] = ()) -> str:
    """Writes ``report.html`` in the run's folder from whatever is there, and returns it; ``left``: what is not."""
    from puzzle.report.contents import Contents
    from puzzle.report.page import page

    text = page(Contents.of(run, left))
    artifacts.write_text(run.report, text)
    return text
