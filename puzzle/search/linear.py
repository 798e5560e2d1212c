"""One integer programme through OR-Tools' MathOpt, its answer checked exactly. Reads a Problem, writes nothing.

HiGHS: of the solvers that come with OR-Tools it is fastest or nearly so at every size, and unlike CP-SAT it takes
floats as they are. One thread and a fixed seed: the same programme gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from puzzle.search.problem import Problem, Row
from puzzle.types import PuzzleError

TOLERANCE = 1e-9  # of rows whose numbers are at most 1
RELATIVE_GAP = 1e-9
FORBIDDEN_CHOICES = 20  # tried one by one before the bound itself is drawn in


@dataclass(frozen=True)
class Cut:
    """``sum of weights of the chosen items <= limit``: whole numbers, hence exact in the solver."""

    weights: Mapping[str, int]
    limit: int


@dataclass(frozen=True)
class Choice:
    """An answer that keeps every bound exactly; none has a total below ``bound``. ``proven``: no better one exists."""

    chosen: tuple[str, ...]
    total: Fraction
    bound: float
    proven: bool


@dataclass(frozen=True)
class _Relaxed:
    chosen: tuple[str, ...]
    bound: float


def minimise(
    problem: Problem, objective: Mapping[str, float], rows: Sequence[Row], cuts: Sequence[Cut] = ()
) -> Choice | None:
    """The choice with the smallest sum of ``objective`` that covers every site once and keeps ``rows``; None if none.

    Raises PuzzleError if the solver gives up, which it has no reason to.
    """
    conflict_cuts = [
        Cut(dict.fromkeys(conflict.item_ids, 1), len(conflict.item_ids) - 1) for conflict in problem.conflicts
    ]
    forbidden: list[Cut] = []
    margins: dict[str, Fraction] = {}
    bound = -math.inf
    while True:
        relaxed = _solve(problem, objective, [(row, margins.get(row.written, Fraction(0))) for row in rows],
                         [*conflict_cuts, *cuts, *forbidden])  # fmt: skip
        if relaxed is None:
            return None
        if not margins:
            bound = relaxed.bound
        broken = [row for row in rows if not row.holds(relaxed.chosen)]
        if not broken:
            total = sum((Fraction(objective[item_id]) for item_id in relaxed.chosen), Fraction(0))
            return Choice(relaxed.chosen, total, bound, proven=not margins)
        # within the solver's tolerance, but over the bound. Forbidding this one choice loses nothing else
        forbidden.append(Cut(dict.fromkeys(relaxed.chosen, 1), len(relaxed.chosen) - 1))
        if len(forbidden) > FORBIDDEN_CHOICES:
            for row in broken:
                margins[row.written] = 2 * margins.get(row.written, _excess(row, relaxed.chosen))


def _excess(row: Row, chosen: Sequence[str]) -> Fraction:
    lower, upper = row.linear_bounds()
    total = row.quantity.linear(chosen)
    return max(total - upper if upper is not None else Fraction(0), lower - total if lower is not None else Fraction(0))


def _solve(
    problem: Problem, objective: Mapping[str, float], rows: Sequence[tuple[Row, Fraction]], cuts: Sequence[Cut]
) -> _Relaxed | None:
    from ortools.math_opt.python import mathopt  # type: ignore[import-untyped,unused-ignore]
    from ortools.math_opt.solvers import highs_pb2  # type: ignore[import-untyped,unused-ignore]

    model = mathopt.Model()
    x = {item.id: model.add_binary_variable(name=item.id) for item in problem.items}
    covering: dict[object, list[mathopt.Variable]] = {site: [] for site in problem.sites}
    for item in problem.items:
        for site in item.sites:
            covering[site].append(x[item.id])
    for variables in covering.values():
        model.add_linear_constraint(mathopt.fast_sum(variables) == 1)
    for row, margin in rows:
        scaled = _scaled(row, margin, list(x))
        if scaled.lower > scaled.upper:
            return None
        terms = mathopt.fast_sum([value * x[item_id] for item_id, value in scaled.coefficients.items()])
        model.add_linear_constraint(lb=scaled.lower, ub=scaled.upper, expr=terms)
    for cut in cuts:
        terms = mathopt.fast_sum([weight * x[item_id] for item_id, weight in cut.weights.items()])
        model.add_linear_constraint(ub=cut.limit, expr=terms)
    largest = max((abs(objective[item_id]) for item_id in x), default=0.0) or 1.0
    model.minimize(mathopt.fast_sum([objective[item_id] / largest * x[item_id] for item_id in x]))
    tolerances = {"primal_feasibility_tolerance": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE}
    options = highs_pb2.HighsOptionsProto(
        int_options={"threads": 1}, double_options={**tolerances, "small_matrix_value": 1e-12}
    )
    parameters = mathopt.SolveParameters(
        random_seed=0, relative_gap_tolerance=RELATIVE_GAP, absolute_gap_tolerance=0.0, highs=options
    )
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        return None
    if reason != mathopt.TerminationReason.OPTIMAL:
        raise PuzzleError(f"the solver stopped without an answer ({result.termination.detail or reason.name})")
    values = result.variable_values()
    chosen = tuple(item_id for item_id, variable in x.items() if values[variable] > 0.5)
    return _Relaxed(chosen, result.best_objective_bound() * largest)


@dataclass(frozen=True)
class _Scaled:
    coefficients: Mapping[str, float]
    lower: float
    upper: float


def _scaled(row: Row, margin: Fraction, item_ids: Sequence[str]) -> _Scaled:
    """The row in numbers a solver likes: whole numbers by their common divisor, others by the largest of them."""
    raw = {item_id: row.quantity.coefficients[item_id] for item_id in item_ids if row.quantity.coefficients[item_id]}
    constant = Fraction(row.quantity.constant)
    lower, upper = row.linear_bounds()
    lower = None if lower is None else lower - constant + margin
    upper = None if upper is None else upper - constant - margin
    if row.quantity.whole:
        # rounding the bound to the next whole number changes nothing, and leaves the solver's tolerance without effect
        divisor = math.gcd(*(int(value) for value in raw.values())) or 1
        return _Scaled(
            {item_id: int(value) // divisor for item_id, value in raw.items()},
            -math.inf if lower is None else math.ceil(lower / divisor),
            math.inf if upper is None else math.floor(upper / divisor),
        )
    numbers = [abs(Fraction(value)) for value in raw.values()]
    numbers += [abs(bound) for bound in (lower, upper) if bound is not None]
    scale = max(numbers, default=Fraction(1)) or Fraction(1)
    return _Scaled(
        {item_id: float(value / scale) for item_id, value in raw.items()},
        -math.inf if lower is None else float(lower / scale),
        math.inf if upper is None else float(upper / scale),
    )
