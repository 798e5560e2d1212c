"""Programmes are solved through their core: the optimum of the whole, bounds that hold, time limits that tell."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ortools.math_opt.python import mathopt
from search_factories import make_problem

import puzzle
from puzzle.search import linear, mip, programme
from puzzle.search.linear import Effort, minimise
from puzzle.search.problem import Problem
from puzzle.types import Conflict, OutOfTimeError, PuzzleError

KINDS = [
    {"rows": ("max", "max", "max")},
    {"rows": ("max", "min")},
    {"rows": ("max", "eq")},
    {"rows": ("max",), "wide": 6, "conflicts": 10},
]


def large(seed: int, **kind: object) -> Problem:
    return make_problem(random.Random(seed), num_sites=24, choices=5, **kind)  # type: ignore[arg-type]


def made_of(problem: Problem) -> programme.Programme:
    made = linear.programme_of(problem, problem.objective, [(row, Fraction(0)) for row in problem.rows])
    assert made is not None
    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_a_solver_of_another_kind_finds_the_same_optimum(kind: dict[str, object], seed: int) -> None:
    problem = large(seed, **kind)
    found = minimise(problem, problem.objective, problem.rows)
    model = programme._model(made_of(problem), integer=True)
    told = mathopt.solve(model, mathopt.SolverType.CP_SAT, params=mathopt.SolveParameters(threads=1))
    assert told.termination.reason == mathopt.TerminationReason.OPTIMAL
    assert found is not None
    assert float(found.total) == pytest.approx(told.objective_value(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_core_has_the_optimum_of_the_whole(
    kind: dict[str, object], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = large(seed, **kind)
    assert len(problem.items) > 2 * len(made_of(problem).lower)
    by_core = minimise(problem, problem.objective, problem.rows)
    monkeypatch.setattr(programme, "_relaxation", lambda _: None)
    whole = minimise(problem, problem.objective, problem.rows)
    assert by_core is not None and whole is not None
    assert by_core.proven
    assert float(by_core.total) == pytest.approx(float(whole.total), rel=1e-8)
    assert by_core.bound <= float(by_core.total) * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_relaxation_bounds_every_choice_from_below(kind: dict[str, object]) -> None:
    """Reduced costs, too: an optimum with one item forced is no better than the bound plus the item's."""
    problem = large(0, **kind)
    relaxed = programme._relaxation(made_of(problem))
    assert relaxed is not None
    rng = random.Random(0)
    for index in rng.sample(range(len(problem.items)), 12):
        others = [item for item in problem.items if set(item.sites) & set(problem.items[index].sites)]
        out = tuple(Conflict((item.id,), "no") for item in others if item is not problem.items[index])
        forced = minimise(replace(problem, conflicts=problem.conflicts + out), problem.objective, problem.rows)
        if forced is not None:
            assert relaxed.bound + relaxed.reduced[index] <= float(forced.total) + 1e-9


def test_a_gap_is_kept_and_stated() -> None:
    problem = large(1, rows=("max", "max", "max"))
    exact = minimise(problem, problem.objective, problem.rows)
    rough = minimise(problem, problem.objective, problem.rows, effort=Effort(relative_gap=0.05))
    assert exact is not None and rough is not None
    assert rough.bound <= float(exact.total) <= float(rough.total)
    assert float(rough.total) - rough.bound <= 0.05 * float(rough.total)
    assert not rough.proven
    (solution,) = mip.solve([problem], {}, effort=Effort(relative_gap=0.05)).solutions
    assert (solution.status, solution.bound_nats) == ("feasible", rough.bound)


def test_a_time_limit_ends_with_the_best_found_and_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still until the first core is solved, then time is over."""
    statuses = []
    for seed in range(5):
        problem = large(seed, rows=("max", "max", "max"))
        exact = minimise(problem, problem.objective, problem.rows)
        ticks = iter([0.0, 0.0])
        with monkeypatch.context() as patch:
            patch.setattr(programme.time, "monotonic", lambda: next(ticks, 1e9))  # noqa: B023
            (solution,) = mip.solve([problem], {}, effort=Effort(seconds=1e6)).solutions
        assert exact is not None
        assert solution.bound_nats <= float(exact.total) * (1 + 1e-9) <= solution.objective_nats * (1 + 2e-9)
        assert solution.objective_nats - solution.bound_nats < 0.1 * solution.objective_nats
        assert problem.violations(solution.items) == ()
        statuses.append(solution.status)
    assert "feasible" in statuses


def test_no_answer_in_time_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large(3, rows=("max",))
    nothing = programme.Answer(None, float("inf"), 0.25, closed=False)
    monkeypatch.setattr(linear, "solve", lambda *_: nothing)
    with pytest.raises(PuzzleError, match=r"within 2 s \(none can be better than 0.25\); allow more time"):
        minimise(problem, problem.objective, problem.rows, effort=Effort(seconds=2))


def test_a_solver_without_a_bound_leaves_one_that_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large(3, rows=("max",))
    best = minimise(problem, problem.objective, ())
    assert best is not None
    nothing = programme.Answer(None, float("inf"), -float("inf"), closed=False)
    monkeypatch.setattr(linear, "solve", lambda *_: nothing)
    with pytest.raises(OutOfTimeError) as caught:
        minimise(problem, problem.objective, problem.rows, effort=Effort(seconds=2))
    assert caught.value.bound == pytest.approx(float(best.total))  # without rows each site has its least


ENDLESS = """
import random, signal, sys
from fractions import Fraction
from ortools.math_opt.python import mathopt
from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.types import FfnSpec, Item, Site

signal.signal(signal.SIGINT, signal.default_int_handler)
solve = mathopt.solve
mathopt.solve = lambda *given, **more: (print("solving", file=sys.stderr, flush=True), solve(*given, **more))[1]
rng = random.Random(0)
sites = tuple(Site(layer, "ffn") for layer in range(60))
items = tuple(Item(f"{site}.{size}", (site,), (FfnSpec("narrow", size),)) for site in sites for size in (1, 2, 3))
costs = {item.id: float(rng.randrange(10**11, 10**12)) for item in items}
row = Row(Quantity("params", "parameters", costs, whole=True), "limit", None, Fraction(int(sum(costs.values()) / 3)))
problem = Problem(items, sites, {name: -cost for name, cost in costs.items()}, (row,))
minimise(problem, problem.objective, problem.rows)
"""


def test_a_solver_at_work_hears_ctrl_c() -> None:
    """Which sum of sixty large numbers is next to a number is a question for years."""
    environment = {**os.environ, "PYTHONPATH": str(Path(puzzle.__file__).parent.parent)}
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE) as child:
        try:
            assert child.stderr is not None
            assert [child.stderr.readline() for _ in range(2)] == 2 * ["solving\n"]  # the relaxation, and the programme
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert errors.endswith("KeyboardInterrupt\n")


def test_what_goes_wrong_in_a_solve_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        programme._interruptible(lambda: 1 // 0)


def test_gaps_of_negative_sums_are_gaps_too() -> None:
    assert linear.Choice(("a",), Fraction(-4), -5.0, proven=False).gap == 0.25
    assert linear.Choice(("a",), Fraction(4), 3.0, proven=False).gap == 0.25
    assert linear.Choice(("a",), Fraction(-4), -5.0, proven=True).gap == 0.0


@pytest.mark.parametrize(("late_bound", "gap"), [(0.5, 0.5), (2.0, 0.0)])
def test_a_batch_size_without_an_answer_in_time_leaves_the_others_open(
    monkeypatch: pytest.MonkeyPatch, late_bound: float, gap: float
) -> None:
    """One search shares its time out; what was not solved may be as good as its bound."""
    first, second = large(3, rows=("max",)), replace(large(3, rows=("max",)), label="late")
    given: list[float | None] = []

    def answer(
        problem: Problem, objective: object, rows: object, cuts: object, effort: Effort, start: object
    ) -> linear.Choice:
        given.append(effort.seconds)
        if problem.label == "late":
            raise OutOfTimeError("late", late_bound)
        return linear.Choice(solved.chosen, Fraction(1), 1.0, True)

    solved = minimise(first, first.objective, first.rows)
    assert solved is not None
    monkeypatch.setattr(mip, "minimise", answer)
    (solution,) = mip.solve([second, first], {}, effort=Effort(seconds=60)).solutions
    assert (solution.status, solution.timed_out, solution.gap) == ("feasible", True, gap)
    assert given[0] == pytest.approx(30, abs=1)
    assert given[1] == pytest.approx(60, abs=1)  # the first took nothing
    with pytest.raises(OutOfTimeError, match="late"):
        mip.solve([second], {}, effort=Effort(seconds=60))


def test_a_start_that_is_not_allowed_is_ignored() -> None:
    problem = large(2, rows=("max", "max"))
    best = minimise(problem, problem.objective, problem.rows)
    assert best is not None
    dearest = [max(problem.items[k : k + 5], key=lambda item: problem.rows[0].quantity.coefficients[item.id]).id
               for k in range(0, 120, 5)]  # fmt: skip
    for start in (dearest, best.chosen[1:], ("unknown",), best.chosen):
        again = minimise(problem, problem.objective, problem.rows, start=start)
        assert again is not None
        assert (again.chosen, again.proven) == (best.chosen, True)


def test_an_infeasible_large_problem_is_none() -> None:
    problem = large(0, rows=("max", "max"))
    impossible = replace(problem.rows[0], upper=Fraction(1))
    assert minimise(problem, problem.objective, (impossible, problem.rows[1])) is None
    # the relaxation has an answer, whole numbers have none: costs are multiples of 2, the bound asks for an odd sum
    quantity = replace(
        problem.rows[0].quantity, coefficients={item.id: 2.0 * int(item.id[-1]) for item in problem.items}, constant=0.0
    )
    odd = replace(problem.rows[0], quantity=quantity, lower=Fraction(101), upper=Fraction(101))
    assert minimise(problem, problem.objective, (odd,)) is None


def test_what_the_solver_prints_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with programme._quiet():
        os.write(1, b"a line of its own debugging\n")
    print("after", flush=True)
    assert capfd.readouterr().out == "after\n"


def test_a_programme_restricted_to_columns_keeps_its_rows() -> None:
    made = made_of(large(0, rows=("max",)))
    columns = np.array([1, 5, 9, 100])
    part = made.only(columns)
    x = np.array([1.0, 0.0, 1.0, 1.0])
    all_x = np.zeros(len(made.objective))
    all_x[columns] = x

    def sums(of: programme.Programme, at: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.bincount(of.row, of.value * at[of.column], len(of.lower))

    assert np.allclose(sums(part, x), sums(made, all_x))
    assert part.objective @ x == made.objective @ all_x
