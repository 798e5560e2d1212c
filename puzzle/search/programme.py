"""An integer programme as arrays, and its solution by OR-Tools' MathOpt. Reads and writes nothing.

    minimise  objective . x   subject to   lower <= rows . x <= upper,   x in {0, 1}

A programme is solved through its core. The linear relaxation (GLOP, milliseconds) gives duals d, and with them,
for every x that is allowed, ``objective . x >= bound + sum_j reduced_j x_j`` with ``reduced = objective - rows^T d``.
So a variable whose reduced cost exceeds (best known - bound) is 0 in whatever is better, under bounds of any kind: it
is left out. Dominated variables need no rule of their own. The bound is computed from the duals here, and holds however
inexact they are.

HiGHS solves the core: on whole programmes SCIP takes about as long, CP-SAT longer, and both many times as long now and
then (benchmarks/LOG.md). One thread and a fixed seed: the same programme gives the same answer, unless time runs out.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from puzzle.types import PuzzleError

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]
Result = TypeVar("Result")
TOLERANCE = 1e-9  # of rows whose numbers are at most 1
RELATIVE_GAP = 1e-9
FIRST_GAP = 1e-3  # at which a first, narrow core is solved: it is to say what can be left out
# of HiGHS: searches within the search, and starting over. They took four fifths of the time of a proof
LEFT_OUT_OF_PROOFS = (
    "mip_heuristic_run_rins",
    "mip_heuristic_run_rens",
    "mip_heuristic_run_root_reduced_cost",
    "mip_allow_restart",
)
FIRST_CORE = 1.5  # variables in it, a row


@dataclass(frozen=True)
class Effort:
    """``relative_gap``: (best found - bound) / best found to stop at. ``seconds``: stop then with what there is."""

    relative_gap: float = RELATIVE_GAP
    seconds: float | None = None

    def shared(self, spent: float, parts: int) -> Effort:
        """For the next of ``parts`` equal shares of the time that is left after ``spent`` seconds."""
        return self if self.seconds is None else replace(self, seconds=max(0.0, self.seconds - spent) / parts)


EXACT = Effort()


@dataclass(frozen=True, eq=False)
class Line:
    """One row: ``lower <= coefficients . x <= upper``, at the columns named."""

    columns: Sequence[int]
    coefficients: Sequence[float]
    lower: float = -math.inf
    upper: float = math.inf


@dataclass(frozen=True, eq=False)
class Programme:
    """Entries of the matrix are (row, column, value); no two share a place."""

    objective: Numbers = field(repr=False)  # (n,)
    lower: Numbers = field(repr=False)  # (m,)
    upper: Numbers = field(repr=False)  # (m,)
    row: Indices = field(repr=False)  # (entries,)
    column: Indices = field(repr=False)
    value: Numbers = field(repr=False)

    @classmethod
    def of(cls, objective: Numbers, lines: Sequence[Line]) -> Programme:
        sizes = [len(line.columns) for line in lines]
        return cls(
            objective,
            np.array([line.lower for line in lines], float),
            np.array([line.upper for line in lines], float),
            np.repeat(np.arange(len(lines)), sizes),
            np.array([column for line in lines for column in line.columns], np.int64),
            np.array([value for line in lines for value in line.coefficients], float),
        )

    def only(self, columns: Indices) -> Programme:
        """The programme in which all other variables are 0."""
        place = np.full(len(self.objective), -1)
        place[columns] = np.arange(len(columns))
        kept = place[self.column] >= 0
        return Programme(
            self.objective[columns],
            self.lower,
            self.upper,
            self.row[kept],
            place[self.column[kept]],
            self.value[kept],
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """``columns`` that are 1, None where time ran out before any were found. ``closed``: the gap asked for is met."""

    columns: Indices | None
    value: float
    bound: float
    closed: bool


def solve(programme: Programme, effort: Effort = EXACT, start: Indices | None = None) -> Answer | None:
    """The best x within the effort; None if there is none. ``start``: columns of an x that is allowed, to begin with.

    Raises PuzzleError if the solver gives up, which it has no reason to.
    """
    deadline = math.inf if effort.seconds is None else time.monotonic() + effort.seconds
    relaxed = _relaxation(programme)
    if relaxed is None:
        return _solve_whole(programme, effort.relative_gap, deadline, start)
    return _solve_by_cores(programme, relaxed, effort.relative_gap, deadline, start)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    bound: float
    reduced: Numbers  # (n,) what a variable that is 1 adds to the bound, at least


def _relaxation(programme: Programme) -> _Relaxed | None:
    """None where the relaxation has no optimum, as far as the solver can tell."""
    from ortools.math_opt.python import mathopt  # type: ignore[import-untyped,unused-ignore]

    model = _model(programme, integer=False)
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        return None
    of_row = {line.id: dual for line, dual in result.dual_values().items()}
    duals = np.array([of_row[index] for index in range(len(programme.lower))], float)
    # a dual on the side where there is no bound is the solver's rounding
    duals[(duals > 0) & np.isinf(programme.lower)] = 0.0
    duals[(duals < 0) & np.isinf(programme.upper)] = 0.0
    reduced = programme.objective - np.bincount(
        programme.column, programme.value * duals[programme.row], len(programme.objective)
    )
    at = np.where(duals > 0, programme.lower, np.where(duals < 0, programme.upper, 0.0))
    bound = math.fsum(duals * at) + math.fsum(np.minimum(reduced, 0.0))
    return _Relaxed(bound, np.maximum(reduced, 0.0))


def _solve_by_cores(
    programme: Programme, relaxed: _Relaxed, relative_gap: float, deadline: float, start: Indices | None
) -> Answer | None:
    """A narrow core first, for a good x; then the core of all that can be part of a better one, if that is more."""
    count = len(programme.objective)
    rounding = 1e-12 * (1.0 + float(np.abs(programme.objective).sum()))
    best = start
    value = math.inf if start is None else math.fsum(programme.objective[start])
    wide = int(FIRST_CORE * len(programme.lower))
    width = float(np.partition(relaxed.reduced, wide)[wide]) if wide < count else math.inf
    while True:
        width = min(width, value - relaxed.bound + rounding)
        columns = np.flatnonzero(relaxed.reduced <= width)
        outside = relaxed.bound + float(relaxed.reduced[relaxed.reduced > width].min(initial=math.inf))
        last = outside >= value or len(columns) == count
        gap = relative_gap if last else max(relative_gap, FIRST_GAP)
        begin = None if best is None or not np.isin(best, columns).all() else np.searchsorted(columns, best)
        found = _solve_whole(programme.only(columns), gap, deadline, begin, proving=last and best is not None)
        if found is not None and found.columns is not None and found.value < value:
            best, value = columns[found.columns], found.value
        bound = max(relaxed.bound, min(outside, math.inf if found is None else found.bound))
        if last and found is None and best is None:
            return None
        met = best is not None and value - bound <= relative_gap * abs(value)
        closed = met or (last and (found is None or found.closed))
        if closed or time.monotonic() > deadline:
            return Answer(best, value, min(bound, value), closed)
        if best is None:
            width = max(4 * width, float(relaxed.reduced[relaxed.reduced > 0].min(initial=math.inf)))
        else:
            width = math.inf  # as far as what is known now allows


def _solve_whole(
    programme: Programme, relative_gap: float, deadline: float, start: Indices | None = None, proving: bool = False
) -> Answer | None:
    """``proving``: something good is known already, and the time goes into the proof that nothing is better."""
    from ortools.math_opt.python import mathopt
    from ortools.math_opt.solvers import highs_pb2  # type: ignore[import-untyped,unused-ignore]

    largest = float(np.abs(programme.objective).max(initial=0.0)) or 1.0
    model = _model(programme, integer=True, scale=largest)
    variables = sorted(model.variables(), key=lambda variable: variable.id)
    tolerances = {"primal_feasibility_tolerance": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE}
    options = highs_pb2.HighsOptionsProto(
        int_options={"threads": 1},
        bool_options=dict.fromkeys(LEFT_OUT_OF_PROOFS, False) if proving else {},
        double_options={**tolerances, "small_matrix_value": 1e-12},
    )
    parameters = mathopt.SolveParameters(
        random_seed=0, relative_gap_tolerance=relative_gap, absolute_gap_tolerance=0.0, highs=options
    )
    if deadline < math.inf:
        parameters.time_limit = datetime.timedelta(seconds=max(0.01, deadline - time.monotonic()))
    hints = []
    if start is not None:
        ones = set(start.tolist())
        values = {variable: float(index in ones) for index, variable in enumerate(variables)}
        hints = [mathopt.SolutionHint(variable_values=values)]
    with _quiet():
        result = _interruptible(
            lambda: mathopt.solve(
                model,
                mathopt.SolverType.HIGHS,
                params=parameters,
                model_params=mathopt.ModelSolveParameters(solution_hints=hints),
            )
        )
    reason, reasons = result.termination.reason, mathopt.TerminationReason
    if reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED):
        return None
    if reason not in (reasons.OPTIMAL, reasons.FEASIBLE, reasons.NO_SOLUTION_FOUND):
        raise PuzzleError(f"the solver stopped without an answer ({result.termination.detail or reason.name})")
    bound = result.best_objective_bound() * largest
    if reason == reasons.NO_SOLUTION_FOUND:
        return Answer(None, math.inf, bound, closed=False)
    found = result.variable_values(variables)
    columns = np.flatnonzero(np.array(found) > 0.5)
    return Answer(columns, math.fsum(programme.objective[columns]), bound, reason == reasons.OPTIMAL)


def _model(programme: Programme, integer: bool, scale: float = 1.0) -> Any:
    """By way of the wire format: ten times as fast as adding variables and terms one by one."""
    from ortools.math_opt import model_pb2  # type: ignore[import-untyped,unused-ignore]
    from ortools.math_opt.python import mathopt

    wire, count = model_pb2.ModelProto(), len(programme.objective)
    wire.variables.ids.extend(range(count))
    wire.variables.lower_bounds.extend([0.0] * count)
    wire.variables.upper_bounds.extend([1.0] * count)
    wire.variables.integers.extend([integer] * count)
    priced = np.flatnonzero(programme.objective)
    wire.objective.linear_coefficients.ids.extend(priced.tolist())
    wire.objective.linear_coefficients.values.extend((programme.objective[priced] / scale).tolist())
    wire.linear_constraints.ids.extend(range(len(programme.lower)))
    wire.linear_constraints.lower_bounds.extend(programme.lower.tolist())
    wire.linear_constraints.upper_bounds.extend(programme.upper.tolist())
    order = np.lexsort((programme.column, programme.row))
    wire.linear_constraint_matrix.row_ids.extend(programme.row[order].tolist())
    wire.linear_constraint_matrix.column_ids.extend(programme.column[order].tolist())
    wire.linear_constraint_matrix.coefficients.extend(programme.value[order].tolist())
    return mathopt.Model.from_model_proto(wire)


def _interruptible(work: Callable[[], Result]) -> Result:
    """What the work returns, which has a thread of its own: where it holds the main one, Ctrl-C is not heard."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # raised below, where somebody waits for it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon, so that a process that is told to end does
    return done.result()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallows what HiGHS prints on standard output whatever it is told: a line of its own debugging.

    It stays in C's buffer, which is therefore emptied before and after; where that cannot be done it stays as it is.
    """
    try:
        flush = ctypes.CDLL(None).fflush
    except (OSError, TypeError, AttributeError):  # Windows
        yield
        return
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
