"""Why no architecture fits: the bound, or smallest set of bounds, that cannot hold, and the nearest values that can.

Reads a Problem that has no answer, computes one line of text, writes nothing. Of the bounds that contradict one another
each is then moved as little as the others allow. Some of these questions take a solver forever (which sum of so many
sizes is nearest to a number?), so all have to be answered within a time; what was not proven by then is told as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from time import monotonic

from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Row
from puzzle.search.programme import Effort
from puzzle.types import OutOfTimeError

DIGITS = 4
MOST_TRIALS = 500
SECONDS = 10.0  # that a whole explanation may take; by far the most take less than one


@dataclass(frozen=True)
class Near:
    """A value that can be; None: there is none. ``proven``: none is nearer; else none was found in time."""

    value: Fraction | None
    proven: bool


def explain(problem: Problem, seconds: float = SECONDS) -> str:
    """One line naming the bounds that cannot hold and the nearest values that can."""
    until = monotonic() + seconds
    if _possible(problem, (), until) is False:
        reasons = "; ".join(conflict.reason for conflict in problem.conflicts)
        return (
            f"no choice of items covers every site exactly once{f' without a conflict ({reasons})' if reasons else ''}"
        )
    for one, other in itertools.permutations(problem.rows, 2):
        lower, upper = one.lower, other.upper
        if one.quantity == other.quantity and lower is not None and upper is not None and lower > upper:
            return f"{one.written} and {other.written} contradict each other; change one of them"
    rows = core(problem, (until - monotonic()) / 2)
    if not rows:
        return "the bounds cannot hold within the solver's tolerance; loosen them by a little"
    left = (until - monotonic()) / len(rows)
    if len(rows) == 1:
        return f"{rows[0].written} cannot be met: {_nearest(problem, rows[0], (), left)}"
    ways = []
    for row in rows:
        others = [other for other in rows if other is not row]
        near = _nearest(problem, row, others, left)
        ways.append(f"with the other{'s' if len(others) > 1 else ''}, of {row.quantity.name} {near}")
    return f"these bounds cannot hold together: {', '.join(row.written for row in rows)}; {'; '.join(ways)}"


def core(problem: Problem, seconds: float = SECONDS) -> tuple[Row, ...]:
    """A smallest set of rows that cannot hold together; none if all can.

    Leaving rows out one by one gives a set of which each is needed; smaller sets are then tried, up to MOST_TRIALS of
    them, in the time that there is.
    """
    until = monotonic() + seconds
    found = list(problem.rows)
    if _possible(problem, found, until):
        return ()
    for row in problem.rows:
        without = [other for other in found if other is not row]
        if _possible(problem, without, until) is False:
            found = without
    smaller = (rows for size in range(1, len(found)) for rows in itertools.combinations(problem.rows, size))
    for rows in itertools.islice(smaller, MOST_TRIALS):
        if monotonic() > until:
            break
        if _possible(problem, rows, until) is False:
            return rows
    return tuple(found)


def nearest(
    problem: Problem, row: Row, others: Sequence[Row], seconds: float = SECONDS
) -> tuple[Near | None, Near | None]:
    """The values nearest to the row's bounds, below the lower and above the upper one, that ``others`` allow.

    None on a side where the row has no bound.
    """
    half = seconds / 2
    lower, upper = replace(row, lower=None, upper=row.lower), replace(row, upper=None, lower=row.upper)
    below = None if row.lower is None else _extreme(problem, lower, others, False, half)
    above = None if row.upper is None else _extreme(problem, upper, others, True, half)
    return below, above


def _possible(problem: Problem, rows: Sequence[Row], until: float) -> bool | None:
    """None: not known in time."""
    effort = Effort(seconds=max(0.0, until - monotonic()))
    try:
        return minimise(problem, dict.fromkeys(problem.objective, 0.0), rows, effort=effort) is not None
    except OutOfTimeError:
        return None


def _nearest(problem: Problem, row: Row, others: Sequence[Row], seconds: float) -> str:
    """The nearest values in words, rounded so that writing one down as the bound works."""
    ends = [(near, up) for near, up in zip(nearest(problem, row, others, seconds), (False, True), strict=True) if near]
    one_sided = len(ends) == 1
    values = [_show(near.value, row, upwards=up and one_sided) for near, up in ends if near.value is not None]
    if not values:
        return "nothing near was found in time"
    word = "nearest" if not one_sided else "smallest" if row.upper is not None else "largest"
    sure = "possible" if all(near.proven for near, _ in ends) else "found in time"
    return f"the {word} {sure} is {' or '.join(values)} {row.quantity.unit}"


def _extreme(problem: Problem, row: Row, others: Sequence[Row], smallest: bool, seconds: float) -> Near:
    """The smallest or largest value of the row's quantity under its own bounds and the others'."""
    # a rate is largest where the time it is divided by is smallest
    sign = 1 if smallest == (row.quantity.numerator is None) else -1
    objective = {item_id: sign * row.quantity.coefficients[item_id] for item_id in problem.objective}
    try:
        choice = minimise(problem, objective, [*others, row], effort=Effort(seconds=max(0.0, seconds)))
    except OutOfTimeError:
        return Near(None, proven=False)
    return Near(None, proven=True) if choice is None else Near(row.quantity.value(choice.chosen), choice.proven)


def _show(value: Fraction, row: Row, upwards: bool) -> str:
    if row.quantity.whole:
        return str(int(value))
    if value == 0:
        return "0"
    digits_after = DIGITS - 1 - math.floor(math.log10(abs(value)))
    step = Fraction(10) ** -digits_after
    rounded = (math.ceil(value / step) if upwards else math.floor(value / step)) * step
    return f"{float(rounded):.{DIGITS}g}"
