"""The front of the objective and several costs: an ε-grid of exact solves, each with its bound and gap.

Reads a Problem, computes a Surface, writes at most a PNG. At every combination of limits, so many for each cost, evenly
from the least to the most that it can be, the best objective is solved for; of what costs no more at that objective,
the cheapest is kept; what another point equals or beats in all is dropped. Two things save solves: an answer that keeps
tighter limits, too, is the best there, and below limits that nothing keeps nothing keeps tighter ones. The others begin
at the best answer known that is allowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle import style
from puzzle.search.linear import Choice, minimise
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.search.programme import EXACT, Effort
from puzzle.types import ConfigError, InfeasibleError, OutOfTimeError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

MOST_CELLS = 100_000
Limits = tuple[Fraction, ...]


@dataclass(frozen=True)
class Point:
    """``bound``: no objective within the limits that it was found at is below; ``gap``: from there, relative."""

    chosen: tuple[str, ...]
    costs: tuple[float, ...]
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Surface:
    """Points by ascending costs. ``unfinished``: limits at which time was up before anything was found."""

    costs: tuple[Quantity, ...]
    objective_name: str
    points: tuple[Point, ...]
    unfinished: int = 0

    def frame(self, architectures: bool = False) -> pd.DataFrame:
        """Columns: ``point``, the costs' and the objective's names, ``bound``, ``gap``; ``items``, one text a point."""
        import pandas as pd

        columns: dict[str, list[object]] = {"point": list(range(len(self.points)))}
        for place, cost in enumerate(self.costs):
            columns[cost.name] = [point.costs[place] for point in self.points]
        columns[self.objective_name] = [point.objective for point in self.points]
        columns["bound"] = [point.bound for point in self.points]
        columns["gap"] = [point.gap for point in self.points]
        if architectures:
            columns["items"] = [" ".join(point.chosen) for point in self.points]
        return pd.DataFrame(columns)


def surface(problem: Problem, cost_names: Sequence[str], num_limits: int, effort: Effort = EXACT) -> Surface:
    """The front of the objective against these quantities; the problem's rows are not applied, its conflicts are.

    ``effort``: of one solve. ConfigError for a rate, a cost that is named twice and more limits than anybody waits
    for, InfeasibleError where no choice covers every site.
    """
    costs = tuple(additive(problem, name) for name in cost_names)
    if len(set(cost_names)) < len(cost_names):
        raise ConfigError(f"--cost: {', '.join(cost_names)}: one is named twice")
    if num_limits < 2 or num_limits ** len(costs) > MOST_CELLS:
        raise ConfigError(f"--points: {num_limits} limits for each of {len(costs)} costs; give 2 or more, and fewer")
    grid = [_limits(*extremes(problem, cost), num_limits) for cost in costs]
    found: dict[Limits, Choice] = {}
    impossible: list[Limits] = []
    unfinished = 0
    for limits in itertools.product(*grid):  # from loose to tight
        if any(_within(limits, tight) for tight in impossible) or any(
            _within(limits, at) and _keeps(choice.chosen, costs, limits) for at, choice in found.items()
        ):
            continue
        rows = [Row(cost, cost.name, upper=limit) for cost, limit in zip(costs, limits, strict=True)]
        allowed = [choice for choice in found.values() if _keeps(choice.chosen, costs, limits)]
        start = min(allowed, key=lambda choice: choice.total).chosen if allowed else None
        try:
            choice = minimise(problem, problem.objective, rows, effort=effort, start=start)
        except OutOfTimeError:
            unfinished += 1
            continue
        if choice is None:
            impossible.append(limits)
        else:
            found[limits] = choice
    points = {_point(problem, costs, _cheapest(problem, costs, choice, effort), choice) for choice in found.values()}
    kept = [point for point in points if not any(_beats(other, point) for other in points)]
    return Surface(costs, problem.objective_name, tuple(sorted(kept, key=lambda point: point.costs)), unfinished)


def additive(problem: Problem, name: str) -> Quantity:
    """The quantity of that name. ConfigError for a rate, which is no plain sum."""
    quantity = problem.quantity(name)
    if quantity.numerator is not None:
        raise ConfigError(f"{name} is a rate and does not add up over items; take the front over e2e_ms instead")
    return quantity


def extremes(problem: Problem, cost: Quantity) -> tuple[Fraction, Fraction]:
    """The least and the most that it can be. InfeasibleError where no choice covers every site."""
    ends = []
    for sign in (1, -1):
        choice = minimise(problem, {item.id: sign * cost.coefficients.get(item.id, 0.0) for item in problem.items}, ())
        if choice is None:
            raise InfeasibleError("no choice of items covers every site exactly once without a conflict")
        ends.append(cost.value(choice.chosen))
    return ends[0], ends[1]


def _limits(least: Fraction, most: Fraction, count: int) -> list[Fraction]:
    """From the most down to the least, both among them."""
    return list(dict.fromkeys(most - (most - least) * Fraction(step, count - 1) for step in range(count)))


def _within(limits: Limits, others: Limits) -> bool:
    """Whether no limit is looser than the other."""
    return all(one <= other for one, other in zip(limits, others, strict=True))


def _keeps(chosen: Sequence[str], costs: Sequence[Quantity], limits: Limits) -> bool:
    return all(cost.value(chosen) <= limit for cost, limit in zip(costs, limits, strict=True))


def _cheapest(problem: Problem, costs: Sequence[Quantity], choice: Choice, effort: Effort) -> tuple[str, ...]:
    """Of all that are no worse in anything, what costs least in sum, each cost relative to this choice's."""
    quality = Quantity(problem.objective_name, "", problem.objective)
    rows = [Row(cost, cost.name, upper=cost.value(choice.chosen)) for cost in costs]
    rows.append(Row(quality, quality.name, upper=choice.total))
    weights: Mapping[str, float] = {
        item.id: sum(
            cost.coefficients.get(item.id, 0.0) / (abs(float(cost.linear(choice.chosen))) or 1.0) for cost in costs
        )
        for item in problem.items
    }
    try:
        better = minimise(problem, weights, rows, effort=effort, start=choice.chosen)
    except OutOfTimeError:
        return choice.chosen
    return choice.chosen if better is None else better.chosen


def _point(problem: Problem, costs: Sequence[Quantity], chosen: tuple[str, ...], choice: Choice) -> Point:
    return Point(
        problem.in_order(chosen),
        tuple(float(cost.value(chosen)) for cost in costs),
        float(problem.objective_of(chosen)),
        choice.bound,
        choice.gap,
    )


def _beats(one: Point, other: Point) -> bool:
    """No worse in anything, and not the same point; of equals the first by name stays."""
    left, right = (*one.costs, one.objective), (*other.costs, other.objective)
    if left == right:
        return (one.bound, one.chosen) > (other.bound, other.chosen)
    return all(mine <= theirs for mine, theirs in zip(left, right, strict=True))


def plot(found: Surface, path: Path) -> None:
    """Writes a PNG: the objective over the first cost, coloured by the second, a colour map safe for the colour-blind.

    Further costs are in the table only.
    """
    first, second = found.costs[:2]
    figure = style.new_figure(7, 4.5)
    axes = figure.add_subplot()
    drawn = axes.scatter(
        [point.costs[0] for point in found.points],
        [point.objective for point in found.points],
        c=[point.costs[1] for point in found.points],
        cmap=style.SCALE,
        s=24,
    )
    figure.colorbar(drawn, label=f"{second.name} ({second.unit})")
    axes.set_xlabel(f"{first.name} ({first.unit})")
    axes.set_ylabel(f"{found.objective_name.removesuffix('_nats')}, sum of scores (nats per token)")
    axes.set_title(f"{len(found.points)} architectures that no other found equals or beats in all", fontsize=10)
    style.save(figure, path)
