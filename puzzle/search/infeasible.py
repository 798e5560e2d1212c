"""Why no architecture fits: the bound, or smallest set of bounds, that cannot hold, and the nearest values that can.

Reads a Problem that has no answer, computes one line of text, writes nothing. Of the bounds that contradict one another
each is then moved as little as the others allow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Row

DIGITS = 4
MOST_TRIALS = 500


def explain(problem: Problem) -> str:
    """One line naming the bounds that cannot hold and the nearest values that can."""
    if not _possible(problem, ()):
        reasons = "; ".join(conflict.reason for conflict in problem.conflicts)
        return (
            f"no choice of items covers every site exactly once{f' without a conflict ({reasons})' if reasons else ''}"
        )
    rows = core(problem)
    if not rows:
        return "the bounds cannot hold within the solver's tolerance; loosen them by a little"
    if len(rows) == 1:
        return f"{rows[0].written} cannot be met: {_nearest(problem, rows[0], ())}"
    ways = []
    for row in rows:
        others = [other for other in rows if other is not row]
        ways.append(
            f"with the other{'s' if len(others) > 1 else ''}, of {row.quantity.name} {_nearest(problem, row, others)}"
        )
    return f"these bounds cannot hold together: {', '.join(row.written for row in rows)}; {'; '.join(ways)}"


def core(problem: Problem) -> tuple[Row, ...]:
    """A smallest set of rows that cannot hold together; none if all can.

    Leaving rows out one by one gives a set of which each is needed; smaller sets are then tried, up to MOST_TRIALS of
    them.
    """
    found = list(problem.rows)
    if _possible(problem, found):
        return ()
    for row in problem.rows:
        without = [other for other in found if other is not row]
        if not _possible(problem, without):
            found = without
    smaller = (rows for size in range(1, len(found)) for rows in itertools.combinations(problem.rows, size))
    for rows in itertools.islice(smaller, MOST_TRIALS):
        if not _possible(problem, rows):
            return rows
    return tuple(found)


def nearest(problem: Problem, row: Row, others: Sequence[Row]) -> tuple[Fraction | None, Fraction | None]:
    """The values nearest to the row's bounds, below the lower and above the upper one, that ``others`` allow.

    None on a side where the row has no bound, or where nothing lies.
    """
    below = None if row.lower is None else _extreme(problem, replace(row, lower=None, upper=row.lower), others, False)
    above = None if row.upper is None else _extreme(problem, replace(row, upper=None, lower=row.upper), others, True)
    return below, above


def _possible(problem: Problem, rows: Sequence[Row]) -> bool:
    return minimise(problem, dict.fromkeys(problem.objective, 0.0), rows) is not None


def _nearest(problem: Problem, row: Row, others: Sequence[Row]) -> str:
    """The nearest values in words, rounded so that writing one down as the bound works."""
    unit = row.quantity.unit
    below, above = nearest(problem, row, others)
    if row.lower is not None and row.upper is not None:
        near = [_show(value, row, upwards=False) for value in (below, above) if value is not None]
        return f"the nearest possible is {' or '.join(near)} {unit}"
    if row.upper is not None:
        assert above is not None, "the others alone are possible"
        return f"the smallest possible is {_show(above, row, upwards=True)} {unit}"
    assert below is not None, "the others alone are possible"
    return f"the largest possible is {_show(below, row, upwards=False)} {unit}"


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
