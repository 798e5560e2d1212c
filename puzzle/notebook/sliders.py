"""What is behind the explorer's sliders: a limit for each, and the exact search at whatever values they stand. Pure.

Reads a front and the constraint file that it came with; computes views, prices and the nearest values that can hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from puzzle.notebook.front import ParetoFront
from puzzle.notebook.solution import SolutionView, file_text
from puzzle.report.words import at_least, figure
from puzzle.search import explain, infeasible, mip
from puzzle.search.constraints import SIGNS, Side
from puzzle.search.explain import RowStory
from puzzle.search.problem import Chosen, Problem, Quantity, Row, solved
from puzzle.search.programme import Effort
from puzzle.search.surface import extremes

QUICK = Effort(relative_gap=1e-3)  # while a slider moves; once it rests the answer is proven
STEPS = 200  # of a slider, about
BEYOND = 0.03  # of its range: how far a slider goes to where nothing can be


@dataclass(frozen=True)
class Limit:
    """One bound: a metric as a constraint file names it, and its slider's values, all in ``unit``."""

    name: str
    side: Side
    unit: str
    start: float
    least: float
    most: float
    step: float
    whole: bool

    @property
    def label(self) -> str:
        return f"{self.name} {SIGNS[self.side]}"

    def on_grid(self, value: float) -> float:
        """The nearest of the slider's values that asks for no more."""
        steps = (value - self.start) / self.step
        up, down = math.ceil(steps - 1e-9), math.floor(steps + 1e-9)
        found = self.start + self.step * {"max": up, "min": down, "eq": round(steps)}[self.side]
        return round(found) if self.whole else found

    def row(self, problem: Problem, value: float) -> Row:
        """The bound at ``value``, as clear of it as a constraint file with that number would be."""
        quantity = problem.quantity(self.name)
        clear = 1 - Fraction(quantity.margin)
        lower = None if self.side == "max" else Fraction(value) / clear
        upper = None if self.side == "min" else Fraction(value) * clear
        return Row(quantity, f"{self.label} {figure(value)} {self.unit}", lower, upper)

    def written(self, value: Fraction, quantity: Quantity) -> float:
        """The number for a constraint file that allows ``value``, and hardly anything beyond it."""
        return _written(self.side, value, quantity)


@dataclass(frozen=True, eq=False)
class Sliders:
    """``limits`` are the constraint file's, and one on the front's cost where the file has none.

    Percentages are the numbers that they come to at the first batch sizes.
    """

    front: ParetoFront = field(repr=False)
    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, front: ParetoFront) -> Sliders:
        problems = front.tables.problems
        limits = [_limit(problems, row) for row in problems[0].rows]
        if not any(limit.name == front.front.cost_name and limit.side == "max" for limit in limits):
            cost = problems[0].quantity(front.front.cost_name)
            limits.append(_limit(problems, Row(cost, cost.name, upper=extremes(problems[0], cost)[1])))
        return cls(front, tuple(limits))

    @property
    def start(self) -> tuple[float, ...]:
        """The file's own values."""
        return tuple(limit.start for limit in self.limits)

    def solve(self, values: Sequence[float], start: Chosen | None = None, effort: Effort = QUICK) -> SolutionView:
        """The best architecture within the limits at these values; ``start``: the answer at neighbouring ones.

        InfeasibleError with the nearest values that can hold.
        """
        problems = [self._at(problem, values) for problem in self.front.tables.problems]
        (solution,) = mip.solve(problems, {}, effort=effort, start=start).solutions
        return self.front.tables.view(solved(problems, solution), solution, self.text(values))

    def nearest(self, values: Sequence[float], moved: int) -> float | None:
        """Where nothing fits: the nearest value of the limit that was moved at which something does, as far as is found
        in the time of an explanation.

        None where the other limits cannot be kept together.
        """
        limit, found, problems = self.limits[moved], [], self.front.tables.problems
        for problem in problems:
            rows = list(self._at(problem, values).rows)
            row = rows.pop(moved)
            ends = infeasible.nearest(problem, row, rows, infeasible.SECONDS / len(problems))
            found += [limit.written(end.value, row.quantity) for end in ends if end and end.value is not None]
        return min(found, key=lambda value: abs(value - values[moved]), default=None)

    def prices(self, view: SolutionView) -> tuple[RowStory, ...]:
        """Of each limit what a little more or less of it would buy or cost, by exact solves.

        ``view`` is proven the best; nothing where a cost is minimised, and the quality is bounded.
        """
        return explain.prices(view.problem, view.solution.items) if view.problem.cost is None else ()

    def point(self, view: SolutionView) -> tuple[float, float]:
        """Where an architecture lies in the front's picture: its cost and the sum of its scores."""
        chosen, problem = view.solution.items, self.front.problem
        return view.solution.totals[self.front.front.cost_name], float(problem.objective_of(chosen))

    def text(self, values: Sequence[float]) -> str:
        """The constraint file with the limits at these values."""
        limits: dict[str, dict[str, float]] = {}
        for limit, value in zip(self.limits, values, strict=True):
            limits.setdefault(limit.name, {})[limit.side] = value
        return file_text(self.front.tables.file, limits)

    def _at(self, problem: Problem, values: Sequence[float]) -> Problem:
        rows = (limit.row(problem, value) for limit, value in zip(self.limits, values, strict=True))
        return replace(problem, rows=tuple(rows))


def price_words(story: RowStory, unit: str) -> str:
    """What a limit costs, in a line; ``unit`` is the quality's."""
    if not story.binds:
        return "does not bind"
    step = f"{figure(float(story.step))} {story.row.quantity.unit.partition(',')[0]}"
    return f"binds; {', '.join(explain.gains(story, step, unit))}"


def _limit(problems: Sequence[Problem], row: Row) -> Limit:
    """The slider of a bound: from what is just impossible to what asks for nothing."""
    quantity = row.quantity
    side: Side = "max" if row.lower is None else "min" if row.upper is None else "eq"
    bound = row.lower if row.upper is None else row.upper
    assert bound is not None, "a row has a bound"
    start = _written(side, bound, quantity)
    ends = [float(end) for problem in problems for end in extremes(problem, problem.quantity(quantity.name))]
    least, most = min(ends), max(ends)
    step = _step((most - least) / STEPS or abs(most) / STEPS or 1.0, quantity.whole)
    beyond = BEYOND * (most - least)
    least = min(max(0.0, least - beyond) if side == "max" and least >= 0 else least, start)
    most = max(most + beyond if side == "min" else most, start)
    # the browser keeps a slider to its steps from the least value on, and the file's value is to be one of them
    down, up = math.ceil((start - least) / step), math.ceil((most - start) / step)
    down -= start - down * step < 0
    return Limit(
        quantity.name, side, quantity.unit, start, start - down * step, start + up * step, step, quantity.whole
    )


def _written(side: Side, value: Fraction, quantity: Quantity) -> float:
    clear = 1 - Fraction(quantity.margin)
    return at_least(value / clear) if side != "min" else -at_least(-value * clear)


def _step(wanted: float, whole: bool) -> float:
    """About as large, as one would say it: 1, 2 or 5 times a power of ten; of counts at least 1."""
    step = float(explain.round_step(Fraction(wanted)))
    return max(1.0, step) if whole else step
