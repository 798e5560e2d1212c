"""What models answer to tasks of the lm-evaluation-harness (harness.py), in one table. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle.report.table import Table
from puzzle.types import Strict

ERRORS = "Of tasks, ± is over questions; in brackets the difference to the first model, paired over them."


@dataclass(frozen=True)
class TaskFigure(Strict):
    """One metric of one model. ``task`` is the one asked for, or of a tag that stands for several, one of these.

    ``standard_error``: None where lm-eval gives none. ``gap``: the difference to the first model and its standard
    error; None where single questions have no values.
    """

    task: str
    metric: str
    model: str
    value: float
    standard_error: float | None
    gap: tuple[float, float] | None

    def cell(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        gap = "" if self.gap is None else f" ({self.gap[0]:+.4f} ± {self.gap[1]:.4f})"
        return f"{self.value:.4f}{error}{gap}"


def rows(figures: Sequence[TaskFigure], models: Sequence[str]) -> list[tuple[str, ...]]:
    """The metric's name, and a cell for each model; empty where it was not asked."""
    cells = {(figure.task, figure.metric, figure.model): figure.cell() for figure in figures}
    metrics = dict.fromkeys((figure.task, figure.metric) for figure in figures)
    return [
        (f"{task}: {metric}", *(cells.get((task, metric, model), "") for model in models)) for task, metric in metrics
    ]


def table(figures: Sequence[TaskFigure]) -> str:
    models = tuple(dict.fromkeys(figure.model for figure in figures))
    return f"{Table(('', *models), tuple(rows(figures, models))).markdown()}\n\n{ERRORS}"
