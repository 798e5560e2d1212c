"""The end of a run: one table and one picture, from the solution, the evaluation and the export. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import artifacts
from puzzle.report.summary import Summary

if TYPE_CHECKING:
    from puzzle.plans import Planned
    from puzzle.progress import Progress
from puzzle.run import Run


def make_report(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Publishes ``report.md`` and ``report.png``."""
    from puzzle.report.figures import draw

    (unit,) = missing
    summary = Summary.of(run)

    def write(aside: Path) -> Mapping[str, Any]:
        (aside / "report.md").write_text(summary.markdown(), encoding="utf-8")
        draw(summary, aside / "report.png")
        return {}

    artifacts.publish_folder(unit.path, unit.inputs, write)
    progress.done(str(unit.path))
