"""The search itself: the integer programme of problem.py, solved exactly (linear.py, programme.py).

Reads Problems, computes Solutions, writes nothing. The first solution minimises the sum of scores, or
a cost in its place and then, among the answers that cost as little, the sum of scores; each further one
must differ (Puzzle, section 4.3): ``sum over common items of their sites <= (1 - min_difference) * num_sites`` against
every earlier one. A solver works within tolerances, so every answer is checked afterwards in exact arithmetic: a
choice that breaks a bound by a hair is forbidden and the programme solved again; it is never returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from time import monotonic

from puzzle.search.infeasible import SECONDS, explain
from puzzle.search.linear import Choice, Cut, minimise, relative_gap
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.search.programme import EXACT, Effort
from puzzle.types import InfeasibleError, OutOfTimeError, Solution


@dataclass(frozen=True)
class Found:
    """``note`` says why there are fewer solutions than asked for, if there are."""

    solutions: tuple[Solution, ...]
    note: str | None = None


def solve(
    problems: Sequence[Problem],
    inputs: Mapping[str, str],
    count: int = 1,
    min_difference: float = 0.2,
    effort: Effort = EXACT,
    start: Sequence[str] | None = None,
    on_solution: Callable[[], None] = lambda: None,
) -> Found:
    """The ``count`` best mutually different answers over all ``problems`` (same items and sites, other batch sizes).

    Ties go to the problem named first. InfeasibleError, with the nearest values that can hold, if no problem has one.
    ``effort``: its time is shared out evenly over all solves to come; what it leaves open is the solution's status
    "feasible", with its bound and gap. OutOfTimeError if it ends before anything is found. ``start``: a choice to begin
    with, e.g. the answer under neighbouring bounds. ``on_solution`` is called as each is found: later ones take longer.
    """
    started = monotonic()
    cuts: list[Cut] = []
    solutions: list[Solution] = []
    open_problems = list(problems)
    while len(solutions) < count:
        to_come = len(open_problems) * (count - len(solutions)) + (problems[0].cost is not None)
        answers = [
            (problem, _answer(problem, cuts, effort.shared(monotonic() - started, to_come - number), start))
            for number, problem in enumerate(open_problems)
        ]
        answered = [(problem, choice) for problem, choice in answers if isinstance(choice, Choice)]
        late = [(problem, error) for problem, error in answers if isinstance(error, OutOfTimeError)]
        if not answered:
            break
        # cuts only pile up: what failed once fails for good
        open_problems = [problem for problem, answer in answers if answer is not None]
        problem, best = min(answered, key=lambda pair: pair[0].rank(pair[1].total))
        others = [one.rank(Fraction(choice.bound)) for one, choice in answered if not choice.proven]
        others += [one.rank(Fraction(error.bound)) for one, error in late]
        proven = best.proven and min(others, default=math.inf) >= problem.rank(best.total) and not late
        bound = min([problem.rank(Fraction(best.bound)), *others])
        best = replace(best, proven=proven, timed_out=bool(late) or any(choice.timed_out for _, choice in answered))
        if problem.cost is not None:
            left = effort.shared(monotonic() - started, to_come - len(answers))
            best = _best_at_that_cost(problem, problem.cost, best, cuts, left)
        solutions.append(solution_of(problem, best, bound, inputs))
        cuts.append(_difference_cut(problem, best, min_difference))
        on_solution()
    if not solutions and late:
        raise late[0][1]
    if not solutions:
        raise _infeasible(problems, effort)
    note = None
    if len(solutions) < count:
        why = "no further one was found in time" if late else "no further one fits and"
        differs = "" if late else f" differs in {min_difference:.0%} of the sites"
        note = f"only {len(solutions)} of {count} solutions: {why}{differs}"
    return Found(tuple(solutions), note)


def _answer(
    problem: Problem, cuts: Sequence[Cut], effort: Effort, start: Sequence[str] | None
) -> Choice | OutOfTimeError | None:
    try:
        return minimise(problem, problem.minimised, problem.rows, cuts, effort, start)
    except OutOfTimeError as error:
        return error


def _best_at_that_cost(problem: Problem, cost: Quantity, choice: Choice, cuts: Sequence[Cut], effort: Effort) -> Choice:
    """Of all choices that cost no more, the one with the best objective: layers share shapes, so many cost the same."""
    value = cost.value(choice.chosen)
    no_more = Row(cost, cost.name, upper=value) if cost.numerator is None else Row(cost, cost.name, lower=value)
    try:
        better = minimise(problem, problem.objective, [*problem.rows, no_more], cuts, effort, choice.chosen)
    except OutOfTimeError:
        return replace(choice, proven=False, timed_out=True)
    if better is not None and better.timed_out:
        choice = replace(choice, proven=False, timed_out=True)
    if better is None or better.total >= problem.objective_of(choice.chosen):
        return choice
    return replace(choice, chosen=better.chosen, total=cost.linear(better.chosen) - Fraction(cost.constant))


def best_of(problems: Sequence[Problem]) -> tuple[Problem, Choice]:
    """The best answer over all ``problems``, and the one that it is of; InfeasibleError if none has one."""
    answers = [(problem, minimise(problem, problem.objective, problem.rows)) for problem in problems]
    answered = [(problem, choice) for problem, choice in answers if choice is not None]
    if not answered:
        raise _infeasible(problems, EXACT)
    return min(answered, key=lambda pair: pair[1].total)


def solution_of(problem: Problem, choice: Choice, bound: Fraction, inputs: Mapping[str, str]) -> Solution:
    """The record of a choice that keeps every bound; none ranks below ``bound``."""
    broken = problem.violations(choice.chosen)
    assert not broken, f"the answer breaks {broken}"
    cost, reached = problem.cost, min(bound, problem.rank(choice.total))
    return Solution(
        items=problem.in_order(choice.chosen),
        objective_nats=float(problem.objective_of(choice.chosen)),
        bound_nats=float(reached) if cost is None else None,
        status="optimal" if choice.proven else "feasible",
        totals=problem.totals(choice.chosen),
        inputs=dict(inputs),
        estimated=tuple(quantity.name for quantity in problem.quantities if quantity.estimated),
        objective_name=problem.objective_name,
        minimised=None if cost is None else cost.name,
        cost_bound=None if cost is None else abs(float(reached)),  # rates rank by their negative; no cost is below 0
        gap=0.0 if choice.proven else relative_gap(float(problem.rank(choice.total)), float(reached)),
        timed_out=choice.timed_out,
    )


def _difference_cut(problem: Problem, choice: Choice, min_difference: float) -> Cut:
    num_sites = len(problem.sites)
    # str(): 0.2 is meant as 1/5, not as the binary number next to it
    in_common = math.floor((1 - Fraction(str(min_difference))) * num_sites)
    weights = {item_id: len(problem.by_id[item_id].sites) for item_id in choice.chosen}
    return Cut(weights, min(in_common, num_sites - 1))


def _infeasible(problems: Sequence[Problem], effort: Effort) -> InfeasibleError:
    """Says why, in as much time as the search may take, or less."""
    seconds = min(SECONDS, effort.seconds or SECONDS) / len(problems)
    reasons = [explain(problem, seconds) for problem in problems]
    if len(problems) == 1:
        return InfeasibleError(reasons[0])
    return InfeasibleError("; ".join(f"{one.label}: {reason}" for one, reason in zip(problems, reasons, strict=True)))
