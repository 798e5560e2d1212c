"""A solution of the search as a notebook shows it, and the tables that it was found in. Pure.

Reads a run's scores and costs under one constraint file; computes views, frames and the constraint file of an answer,
which is all that it writes, when told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle import search, style, yamlfiles
from puzzle.config import ConstraintFile, score_of
from puzzle.notebook.html import page, paragraph
from puzzle.notebook.strip import draw, in_words, svg
from puzzle.report.layers import Layer, layers_of
from puzzle.report.markup import folded_text, table
from puzzle.report.table import Table
from puzzle.report.words import at_least, figure, headline, quality, status
from puzzle.run import Run
from puzzle.search.linear import Choice
from puzzle.search.mip import solution_of
from puzzle.search.problem import Chosen, Problem, Row, solved
from puzzle.tables import ScoreTable
from puzzle.types import Costs, Solution

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

SCORES_ADD_UP = "Quality is predicted by the sum of single scores; ± is its standard error over sequences."


@dataclass(frozen=True, eq=False)
class Tables:
    """What a search reads: the run under its constraint file, its scores and its costs."""

    run: Run
    scores: ScoreTable = field(repr=False)
    costs: Costs = field(repr=False)

    @classmethod
    def of(cls, run: Run) -> Tables:
        """MissingMeasurementError where a stage is still to come."""
        run.check_searches()
        return cls(run, run.read_scores(), run.read_costs())

    @property
    def file(self) -> ConstraintFile:
        return self.run.constraint_file

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """One for each combination of batch sizes."""
        return self.run.problems(self.scores, self.costs)

    def solve(self) -> tuple[SolutionView, ...]:
        """The file's answers, best first; InfeasibleError with the nearest values that can hold."""
        tables = self.scores, self.costs, self.file
        found = search.search(self.run.shape, self.run.items, *tables, {}, self.run.space.conflicts())
        text = yamlfiles.as_yaml(self.file.model_dump(mode="json", exclude_unset=True))
        return tuple(SolutionView(self, solved(self.problems, solution), solution, text) for solution in found)

    def view(self, problem: Problem, solution: Solution, text: str) -> SolutionView:
        """Of an answer that was found otherwise; its standard error is added."""
        error = self.scores.standard_error(solution.items, score_of(solution.objective_name))
        return SolutionView(self, problem, replace(solution, objective_se=error), text)

    def at_cost(self, problem: Problem, chosen: Chosen, cost_name: str) -> SolutionView:
        """A point of the front of that cost: the best architecture that costs no more."""
        cost = problem.quantity(cost_name)
        limit = at_least(cost.value(chosen) / (1 - Fraction(cost.margin)))
        row = Row(cost, f"{cost_name} ≤ {figure(limit)}", upper=Fraction(limit) * (1 - Fraction(cost.margin)))
        bound = replace(problem, rows=(row,))
        total = bound.objective_of(chosen)
        solution = solution_of(bound, Choice(chosen, total, float(total), proven=True), total, {})
        sizes = {name: entry.batch_size for name, entry in self.file.workloads.items()}
        first = {name: size[0] for name, size in sizes.items() if isinstance(size, tuple)}
        text = file_text(self.file, {cost_name: {"max": limit}}, problem.objective_name, first)
        return self.view(bound, solution, text)


def file_text(
    file: ConstraintFile,
    limits: Mapping[str, Mapping[str, float]],
    objective: str | None = None,
    batch_sizes: Mapping[str, int] | None = None,
) -> str:
    """The constraint file with these limits (by metric and side) in the place of its own."""
    document: dict[str, Any] = file.model_dump(mode="json", exclude_unset=True)
    for name, size in (batch_sizes or {}).items():
        document["workloads"][name]["batch_size"] = size
    document["constraints"] = {
        name: {side: int(amount) if float(amount).is_integer() else amount for side, amount in of.items()}
        for name, of in limits.items()
    }
    if objective is not None:
        document["objective"] = objective
    return yamlfiles.as_yaml(document)


@dataclass(frozen=True)
class Total:
    """A metric of an architecture, and the teacher's own, in ``unit``; None: a layer does not offer the teacher's."""

    metric: str
    unit: str
    student: float
    teacher: float | None

    @property
    def share(self) -> float | None:
        """Of the teacher's, where that means something."""
        return None if not self.teacher or self.metric.endswith(".batch_size") else self.student / self.teacher

    @property
    def cells(self) -> tuple[str, str, str]:
        """The student's, the teacher's, and the share, for people."""
        teacher = "" if self.teacher is None else figure(self.teacher)
        return figure(self.student), teacher, "" if self.share is None else f"{self.share:.1%}"


@dataclass(frozen=True, eq=False)
class SolutionView:
    """An architecture that was found: what it is predicted to come to, and the constraint file that yields it.

    ``solution`` is the search's record of it; ``problem`` what it solved, with the bounds in numbers.
    """

    tables: Tables = field(repr=False)
    problem: Problem = field(repr=False)
    solution: Solution
    constraints: str = field(repr=False)  # as YAML

    @cached_property
    def blocks(self) -> tuple[Layer, ...]:
        return layers_of(self.tables.run.shape, self.tables.run.items_of(self.solution))

    @property
    def headline(self) -> str:
        return headline(self.solution)

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer: its variants, and their parameters as a share of the teacher's block (1: as many)."""
        import pandas as pd

        rows = [
            (layer, of.attention.name, of.ffn.name, of.attention.share, of.ffn.share)
            for layer, of in enumerate(self.blocks)
        ]
        return pd.DataFrame(rows, columns=["layer", "attention", "ffn", "attention_share", "ffn_share"])

    @property
    def totals(self) -> pd.DataFrame:
        """One row a metric, the sum of scores first: ``student`` and ``teacher`` in ``unit``, ``share`` of the teacher.

        Where a layer does not offer the teacher's own block, the teacher's columns are missing.
        """
        import pandas as pd

        return pd.DataFrame(
            [(*vars(of).values(), of.share) for of in self.figures],
            columns=["metric", "unit", "student", "teacher", "share"],
        )

    @property
    def bounds(self) -> pd.DataFrame:
        """One row a bound: as it was written, the value in ``unit``, and ``slack``, how far that is from the bound."""
        import pandas as pd

        return pd.DataFrame(self._bounds(), columns=["bound", "unit", "value", "slack"])

    @cached_property
    def figures(self) -> tuple[Total, ...]:
        """The rows of :attr:`totals`."""
        solution, teacher = self.solution, self.problem.teacher
        of_teacher = self.problem.totals(teacher) if teacher else {}
        found = [
            Total(quantity.name, quantity.unit, solution.totals[quantity.name], of_teacher.get(quantity.name))
            for quantity in self.problem.quantities
        ]
        if (name := solution.objective_name) not in solution.totals:
            own = float(self.problem.objective_of(teacher)) if teacher else None
            found.insert(0, Total(name, unit_of(name), solution.objective_nats, own))
        return tuple(found)

    def _bounds(self) -> list[tuple[str, str, float, float]]:
        chosen = self.solution.items
        return [
            (row.written, row.quantity.unit, float(row.quantity.value(chosen)), float(row.slack(chosen)))
            for row in self.problem.rows
        ]

    @property
    def remarks(self) -> str:
        """How sure the figures are."""
        metric, scores = score_of(self.solution.objective_name), self.tables.scores.scores
        methods = [scores[item_id, metric].method for item_id in self.solution.items if (item_id, metric) in scores]
        if count := methods.count("one-pass"):
            return f"{SCORES_ADD_UP} {count} of {len(methods)} scores are estimates from one pass."
        return SCORES_ADD_UP

    def write_constraints(self, path: Path | str) -> Path:
        """Writes :attr:`constraints`, for ``puzzle run RUN --constraints FILE``; an earlier file gives way."""
        written = Path(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(self.constraints, encoding="utf-8")
        return written

    def plot(self) -> style.Picture:
        """The architecture layer by layer, and its totals over the teacher's with the bounds on them."""
        shown = {of.metric: of for of in self.figures if of.share is not None}
        limits = {row.quantity.name: row.upper if row.upper is not None else row.lower for row in self.problem.rows}
        drawn = style.new_figure(12, min(9.0, max(3.5, 0.28 * len(self.blocks) + 1)))
        axes: Any = drawn.subplots(1, 2)
        draw(axes[0], self.blocks)
        axes[1].barh(list(shown), [of.share for of in shown.values()], color=style.NORM, height=0.6)
        axes[1].axvline(1, color=style.TEACHER, linewidth=0.8)
        for name, of in shown.items():
            if of.teacher and (limit := limits.get(name)) is not None:
                axes[1].plot([float(limit) / of.teacher], [name], "|", color=style.CHOSEN, ms=16, mew=2)
        axes[1].invert_yaxis()
        axes[1].set_xlabel("over the teacher's; a mark is the limit")
        axes[1].set_title("Predicted totals")
        drawn.suptitle(f"{self.tables.run.teacher_name}: {self.headline}")
        return style.Picture(drawn)

    def __repr__(self) -> str:
        bounds = (
            f"{bound}: {figure(value)} {unit}, slack {figure(slack)}" for bound, unit, value, slack in self._bounds()
        )
        return "\n".join([self.headline, in_words(self.blocks), *bounds])

    def _repr_html_(self) -> str:
        totals = tuple((f"{of.metric}, {of.unit}", *of.cells) for of in self.figures)
        bounds = tuple(
            (bound, f"{figure(value)} {unit}", figure(slack)) for bound, unit, value, slack in self._bounds()
        )
        minimised = self.solution.minimised is not None
        return page(
            paragraph(self.headline if minimised else quality(self.solution), "strong"),
            paragraph(f"predicted; {status(self.solution)}", "faint"),
            svg(self.blocks, "architecture"),
            table(Table(("bound", "value", "slack"), bounds)) if bounds else paragraph("no bounds"),
            table(Table(("predicted", "student", "teacher", "of the teacher's"), totals)),
            paragraph(self.remarks, "faint"),
            folded_text("constraint file", self.constraints),
        )


def unit_of(objective_name: str) -> str:
    """Of a sum of scores."""
    return "nats per token" if objective_name.endswith("_nats") else "in its own unit"
