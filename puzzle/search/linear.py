"""A Problem as one integer programme, its answer checked exactly. Reads a Problem, writes nothing.

A solver works within tolerances, so what it finds is checked in exact arithmetic: a choice that breaks a bound by a
hair is forbidden and the programme solved again. Rows are scaled to numbers of at most 1, or to small whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from time import monotonic

import numpy as np

from puzzle.search.problem import Problem, Row
from puzzle.search.programme import EXACT, RELATIVE_GAP, Answer, Effort, Indices, Line, Numbers, Programme, solve
from puzzle.types import OutOfTimeError, Site

FORBIDDEN_CHOICES = 20  # tried one by one before the bound itself is drawn in
FAR = 1e3  # times the value: a number of the objective that is larger hides others
LARGEST_COUNT = 2**24  # beyond, whole numbers are scaled like others


@dataclass(frozen=True)
class Cut:
    """``sum of weights of the chosen items <= limit``: whole numbers, hence exact in the solver."""

    weights: Mapping[str, int]
    limit: int

    def holds(self, chosen: Sequence[str]) -> bool:
        return sum(self.weights.get(item_id, 0) for item_id in chosen) <= self.limit


@dataclass(frozen=True)
class Choice:
    """An answer that keeps every bound exactly; none has a total below ``bound``.

    ``proven``: no better one exists. ``timed_out``: the solver's time was up before the gap asked for was met.
    """

    chosen: tuple[str, ...]
    total: Fraction
    bound: float
    proven: bool
    timed_out: bool = False

    @property
    def gap(self) -> float:
        """How far the total may be from the best there is, relative to itself."""
        return 0.0 if self.proven else relative_gap(float(self.total), self.bound)


def relative_gap(total: float, bound: float) -> float:
    """How far ``total`` may be from the best there is, relative to itself; sums of CE differences may be negative."""
    return max(0.0, total - bound) / abs(total) if total else 0.0


def minimise(
    problem: Problem,
    objective: Mapping[str, float],
    rows: Sequence[Row],
    cuts: Sequence[Cut] = (),
    effort: Effort = EXACT,
    start: Sequence[str] | None = None,
) -> Choice | None:
    """The choice with the smallest sum of ``objective`` that covers every site once and keeps ``rows``; None if none.

    ``start``: a choice to begin with, e.g. the answer at a neighbouring bound; one that is not allowed is ignored.
    Raises OutOfTimeError if the time given ends before anything is found.
    """
    started = monotonic()
    conflict_cuts = [
        Cut(dict.fromkeys(conflict.item_ids, 1), len(conflict.item_ids) - 1) for conflict in problem.conflicts
    ]
    forbidden: list[Cut] = []
    margins: dict[str, Fraction] = {}
    bound = -math.inf
    ids = [item.id for item in problem.items]
    place = {item_id: index for index, item_id in enumerate(ids)}
    begin = None
    if start is not None and _allowed(problem, rows, cuts, start):
        begin = np.array(sorted(place[item_id] for item_id in start))
    while True:
        all_cuts = [*conflict_cuts, *cuts, *forbidden]
        made = programme_of(
            problem, objective, [(row, margins.get(row.written, Fraction(0))) for row in rows], all_cuts
        )
        if made is None:
            return None
        found = _solved(problem, made, effort.shared(monotonic() - started, 1), begin)
        if found is None:
            return None
        if not margins:
            bound = found.bound if math.isfinite(found.bound) else math.fsum(_least(problem, made.objective).values())
        if found.columns is None:
            raise OutOfTimeError(
                f"no architecture was found within {effort.seconds:.3g} s (none can be better than {bound:.6g}); "
                "allow more time (solver.time_limit_s), or loosen a bound",
                bound,
            )
        chosen = tuple(ids[column] for column in found.columns)
        broken = [row for row in rows if not row.holds(chosen)]
        if not broken:
            total = sum((Fraction(objective[item_id]) for item_id in chosen), Fraction(0))
            proven = found.closed and not margins and effort.relative_gap <= RELATIVE_GAP
            # the bound is above the total by rounding only
            return Choice(chosen, total, min(bound, float(total)), proven, timed_out=not found.closed)
        # within the solver's tolerance, but over the bound. Forbidding this one choice loses nothing else
        forbidden.append(Cut(dict.fromkeys(chosen, 1), len(chosen) - 1))
        if len(forbidden) > FORBIDDEN_CHOICES:
            for row in broken:
                margins[row.written] = 2 * margins.get(row.written, _excess(row, chosen))


def _solved(problem: Problem, made: Programme, effort: Effort, begin: Indices | None) -> Answer | None:
    """The solver's answer; where a number of the objective is so large that it hides the others from its tolerances,
    that of a smaller one in its place.

    An architecture with an item in it costs at least what that does and the least of all other sites. Where this is
    more than what is known, the item is in nothing better, and how much more it is does not matter.
    """
    started = monotonic()
    found = solve(made, effort, begin)
    while found is not None and found.columns is not None and made.objective.max(initial=0.0) > FAR * abs(found.value):
        least = _least(problem, made.objective)
        total = math.fsum(least.values())
        rest = np.array([math.fsum((total, *(-least[site] for site in item.sites))) for item in problem.items])
        over = made.objective + rest - found.value
        clipped = made.objective - np.maximum(over - max(found.value - total, abs(found.value)), 0.0)
        if found.value <= total or made.objective.max() <= FAR * np.abs(clipped).max():
            break
        made = replace(made, objective=clipped)
        found = solve(made, effort.shared(monotonic() - started, 1), found.columns) or found
    return found


def _least(problem: Problem, objective: Numbers) -> Mapping[Site, float]:
    """By site the least of what items take there: no choice has a smaller sum, whatever the rows say."""
    least: dict[Site, float] = {}
    for item, value in zip(problem.items, objective.tolist(), strict=True):
        share = value / len(item.sites)
        for site in item.sites:
            least[site] = min(least.get(site, share), share)
    return least


def _allowed(problem: Problem, rows: Sequence[Row], cuts: Sequence[Cut], chosen: Sequence[str]) -> bool:
    if not problem.by_id.keys() >= set(chosen):
        return False
    broken = replace(problem, rows=tuple(rows)).violations(chosen)
    return not broken and all(cut.holds(chosen) for cut in cuts)


def _excess(row: Row, chosen: Sequence[str]) -> Fraction:
    lower, upper = row.linear_bounds()
    total = row.quantity.linear(chosen)
    return max(total - upper if upper is not None else Fraction(0), lower - total if lower is not None else Fraction(0))


def programme_of(
    problem: Problem, objective: Mapping[str, float], rows: Sequence[tuple[Row, Fraction]], cuts: Sequence[Cut] = ()
) -> Programme | None:
    """Variables in the order of the items; sites first among the rows. None where a row contradicts itself.

    A row comes with what its bounds are drawn in by.
    """
    ids = [item.id for item in problem.items]
    place = {item_id: index for index, item_id in enumerate(ids)}
    covering: dict[object, list[int]] = {site: [] for site in problem.sites}
    for index, item in enumerate(problem.items):
        for site in item.sites:
            covering[site].append(index)
    lines = [Line(columns, [1.0] * len(columns), 1.0, 1.0) for columns in covering.values()]
    for row, margin in rows:
        scaled = _scaled(row, margin, ids)
        if scaled.lower > scaled.upper:
            return None
        lines.append(scaled)
    for cut in cuts:
        weights = {place[item_id]: float(weight) for item_id, weight in cut.weights.items() if item_id in place}
        lines.append(Line(list(weights), list(weights.values()), upper=cut.limit))
    return Programme.of(np.array([objective[item_id] for item_id in ids], float), lines)


def _clipped(values: Numbers, lower: Fraction | None, upper: Fraction | None) -> Numbers:
    """The same row without numbers so large that they would hide the others from a solver's tolerance.

    Where all are positive, what is above the upper bound may be anything above it, and where there is only a lower
    bound, what is above that may be just that.
    """
    if (values < 0).any():
        return values
    if upper is not None:
        return np.minimum(values, float(2 * upper)) if upper > 0 else values
    return np.minimum(values, float(lower)) if lower is not None and lower > 0 else values


def _scaled(row: Row, margin: Fraction, ids: Sequence[str]) -> Line:
    """The row in numbers a solver likes: whole numbers by their common divisor, others by a power of two: exactly."""
    coefficients = np.array([row.quantity.coefficients.get(item_id, 0.0) for item_id in ids], float)
    columns = np.flatnonzero(coefficients)
    values = coefficients[columns]
    constant = Fraction(row.quantity.constant)
    lower, upper = row.linear_bounds()
    lower = None if lower is None else lower - constant + margin
    upper = None if upper is None else upper - constant - margin
    if row.quantity.whole:
        # rounding the bound to the next whole number changes nothing, and leaves the solver's tolerance without effect
        divisor = math.gcd(*map(int, values.tolist())) or 1
        lower = None if lower is None else Fraction(math.ceil(lower / divisor))
        upper = None if upper is None else Fraction(math.floor(upper / divisor))
        values = values / divisor
    values = _clipped(values, lower, upper)
    largest = max(
        [Fraction(float(np.abs(values).max(initial=0.0))), *(abs(b) for b in (lower, upper) if b is not None)]
    )
    small = row.quantity.whole and largest <= LARGEST_COUNT
    scale = Fraction(1) if small or not largest else Fraction(2) ** math.ceil(math.log2(largest))
    return Line(
        columns.tolist(),
        (values / float(scale)).tolist(),
        -math.inf if lower is None else float(lower / scale),
        math.inf if upper is None else float(upper / scale),
    )
