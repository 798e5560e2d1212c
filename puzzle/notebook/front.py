"""The Pareto front as a notebook shows it. Pure; writes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from puzzle import style
from puzzle.config import OBJECTIVES
from puzzle.notebook.solution import SolutionView, Tables
from puzzle.search import pareto
from puzzle.search.constraints import tasks_in
from puzzle.search.goal import is_quality, nearest
from puzzle.search.pareto import Front
from puzzle.search.problem import Problem
from puzzle.types import ConfigError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    from puzzle.notebook.widget import Explorer


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """All architectures that nothing beats in both quality and one cost, at the workloads' first batch sizes.

    ``tables`` are of the constraint file whose bounds the explorer begins with; on the front itself none binds.
    """

    tables: Tables = field(repr=False)
    problem: Problem = field(repr=False)
    front: Front

    @classmethod
    def of(cls, tables: Tables, x: str, y: str) -> ParetoFront:
        """Of the cost ``x`` and the sum of scores ``y``; ConfigError where they are none."""
        tasks = tasks_in(tables.scores)
        if not is_quality(y, tasks):
            raise ConfigError(f"y: {y!r} is no sum of scores{nearest(y, [*OBJECTIVES, *sorted(tasks)])}")
        free = tables.file.model_copy(update={"constraints": {}, "objective": y})
        problem = replace(tables, run=replace(tables.run, constraints=None, pick=None, limits=free)).problems[0]
        return cls(tables, problem, pareto.front(problem, x))

    def __repr__(self) -> str:
        return f"ParetoFront({len(self)} points, {self.front.objective_name} over {self.front.cost_name})"

    def __len__(self) -> int:
        return len(self.front)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a point, by ascending cost; the columns are named as in a constraint file, with their units.

        ``point`` is what :meth:`at` takes; ``share`` is of the teacher's cost, where the teacher is on offer.
        """
        frame = self.front.frame()
        if self.front.teacher_cost:
            frame["share"] = self.front.cost / self.front.teacher_cost
        return frame

    def at(self, point: int) -> SolutionView:
        """The architecture of a point, with the constraint file that yields it."""
        if not 0 <= point < len(self):
            raise ConfigError(f"point {point}: the front has points 0 to {len(self) - 1}")
        return self.tables.at_cost(self.problem, self.front.chosen(point), self.front.cost_name)

    def within(self, limit: float) -> SolutionView:
        """The best architecture whose cost, in the unit that it is named by, is at most ``limit``."""
        point = self.front.best_within(limit)
        if point is None or math.isnan(limit):
            raise ConfigError(
                f"nothing has {self.front.cost_name} ≤ {limit:g}; the least is {self.front.cost[0]:.6g} "
                f"{self.front.cost_unit}"
            )
        return self.at(point)

    def plot(self, chosen: SolutionView | None = None) -> style.Picture:
        """Quality over cost, the teacher and the chosen architecture marked."""
        return style.Picture(pareto.draw(self.front, None if chosen is None else chosen.solution))

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()

    def explore(self) -> Explorer:
        """The live explorer: a slider for each constraint, and an exact search behind it.

        ConfigError where the packages that draw it are not installed.
        """
        try:
            from puzzle.notebook.widget import Explorer
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "puzzle":
                raise
            package = error.name.split(".")[0]
            raise ConfigError(
                f"explore() needs {package}; pip install 'puzzle-nas[explore]', then restart the notebook"
            ) from None
        return Explorer(self)
