"""Why no architecture fits: the bound, or smallest set of bounds, that cannot hold, and the nearest values that can.

Reads a Problem that has no answer, computes one line of text, writes nothing. First each bound alone; then bounds are
left out one by one until only those remain that contradict one another, and each is moved as little as the others
allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Row

DIGITS = 4


def explain(problem: Problem) -> str:
    """One line naming the bounds that cannot hold and the nearest values that can."""
    if not _possible(problem, ()):
        reasons = "; ".join(conflict.reason for conflict in problem.conflicts)
        return (
            f"no choice of items covers every site exactly once{f' without a conflict ({reasons})' if reasons else ''}"
        )
    for row in problem.rows:
        if not _possible(problem, (row,)):
            return f"{row.written} cannot be met: {_nearest(problem, row, ())}"
    core = list(problem.rows)
    for row in problem.rows:
        without = [other for other in core if other is not row]
        if not _possible(problem, without):
            core = without
    if not core:
        return "the bounds cannot hold within the solver's tolerance; loosen them by a little"
    ways = []
    for row in core:
        others = [other for other in core if other is not row]
        ways.append(
            f"with the other{'s' if len(others) > 1 else ''}, of {row.quantity.name} {_nearest(problem, row, others)}"
        )
    return f"these bounds cannot hold together: {', '.join(row.written for row in core)}; {'; '.join(ways)}"


def _possible(problem: Problem, rows: Sequence[Row]) -> bool:
    return minimise(problem, dict.fromkeys(problem.objective, 0.0), rows) is not None


def _nearest(problem: Problem, row: Row, others: Sequence[Row]) -> str:
    """The value nearest to the bound that ``others`` allow, rounded so that writing it down as the bound works."""
    unit = row.quantity.unit
    if row.lower is not None and row.upper is not None:
        below = _extreme(problem, replace(row, lower=None), others, smallest=False)
        above = _extreme(problem, replace(row, upper=None), others, smallest=True)
        near = [f"{_show(value, row, upwards=False)}" for value in (below, above) if value is not None]
        return f"the nearest possible is {' or '.join(near)} {unit}"
    smallest = row.upper is not None
    value = _extreme(problem, replace(row, lower=None, upper=None), others, smallest)
    assert value is not None, "the others alone are possible"
    return f"the {'smallest' if smallest else 'largest'} possible is {_show(value, row, upwards=smallest)} {unit}"


def _extreme(problem: Problem, row: Row, others: Sequence[Row], smallest: bool) -> Fraction | None:
    """The smallest or largest value of the row's quantity under its own bounds and the others'."""
    # a rate is largest where the time it is divided by is smallest
    sign = 1 if smallest == (row.quantity.numerator is None) else -1
    objective = {item_id: sign * row.quantity.coefficients[item_id] for item_id in problem.objective}
    choice = minimise(problem, objective, [*others, row])
    return None if choice is None else row.quantity.value(choice.chosen)


def _show(value: Fraction, row: Row, upwards: bool) -> str:
    if row.quantity.whole:
        return str(int(value))
    if value == 0:
        return "0"
    digits_after = DIGITS - 1 - math.floor(math.log10(abs(value)))
    step = Fraction(10) ** -digits_after
    rounded = (math.ceil(value / step) if upwards else math.floor(value / step)) * step
    return f"{float(rounded):.{DIGITS}g}"
