"""Hundreds of small searches against brute force, every feature in turn and together, shrunk where one fails.

Numbers are small multiples of 1/4, so that ties and bounds met exactly are the rule, not the exception.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_factories import all_choices

from puzzle.search import infeasible, mip
from puzzle.search.linear import minimise
from puzzle.search.pareto import front
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.types import Conflict, FfnSpec, InfeasibleError, Item, Site

FEATURES = ("plain", "min", "eq", "rate", "wide", "conflicts", "everything")
quarters = st.integers(0, 12).map(lambda number: number / 4)


@st.composite
def problems(draw: st.DrawFn, feature: str) -> Problem:
    """One to five sites of one to three single items, and what the feature adds."""
    has = {name: feature in (name, "everything") for name in FEATURES}
    sites = tuple(Site(layer, "ffn") for layer in range(draw(st.integers(2 if has["wide"] else 1, 5))))
    items = [
        Item(f"{site}.{k}", (site,), (FfnSpec("narrow", k + 1),))
        for site in sites
        for k in range(draw(st.integers(1, 3)))
    ]
    if has["wide"]:
        for number in range(draw(st.integers(1, 3))):
            covered = draw(st.lists(st.sampled_from(sites), min_size=2, max_size=3, unique=True))
            items.append(Item(f"wide{number}", tuple(sorted(covered)), (FfnSpec("skip"),) * len(covered)))
    rows = [draw(rows_of(items, 0, "max", False))]
    rows += [draw(rows_of(items, 1, "min", False))] if has["min"] else []
    rows += [draw(rows_of(items, 2, "eq", False))] if has["eq"] else []
    rows += [draw(rows_of(items, 3, draw(st.sampled_from(["min", "max"])), True))] if has["rate"] else []
    names = [item.id for item in items]
    pairs = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
    conflicts = draw(st.lists(pairs, min_size=1, max_size=4)) if has["conflicts"] else []
    return Problem(
        tuple(items),
        sites,
        {name: draw(quarters) for name in names},
        tuple(rows),
        tuple(row.quantity for row in rows),
        tuple(Conflict(tuple(pair), f"{pair} do not go together") for pair in conflicts),
    )


@st.composite
def rows_of(draw: st.DrawFn, items: Sequence[Item], number: int, side: str, rate: bool) -> Row:
    values = st.integers(0, 4).map(float) if side == "eq" else quarters
    quantity = Quantity(
        f"cost{number}",
        "u",
        {item.id: draw(values) for item in items},
        constant=1.0,
        numerator=draw(st.sampled_from([1.0, 7.0])) if rate else None,
        whole=side == "eq",
    )
    bound = Fraction(draw(st.integers(1, 12)), 8 if rate else 1)
    lower, upper = (bound if side in ("min", "eq") else None), (bound if side in ("max", "eq") else None)
    return Row(quantity, f"cost{number} {side} {bound}", lower, upper)


def feasible(problem: Problem) -> list[tuple[str, ...]]:
    return [chosen for chosen in all_choices(problem) if not problem.violations(chosen)]


quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize("feature", FEATURES)
def test_equal_optimum_and_equal_feasibility(feature: str) -> None:
    @quick
    @given(problems(feature))
    def check(problem: Problem) -> None:
        found = minimise(problem, problem.objective, problem.rows)
        allowed = feasible(problem)
        assert (found is None) == (not allowed)
        if found is not None:
            assert found.total == min(map(problem.objective_of, allowed))
            assert problem.violations(found.chosen) == ()
            assert found.proven
            assert found.bound <= float(found.total)

    check()


@quick
@given(problems("everything"), st.sampled_from([0.0, 0.3, 0.5]))
def test_diverse_solutions_over_several_problems(first: Problem, difference: float) -> None:
    """Batch sizes give problems of the same items and sites with other rows."""
    siblings = [first, *(replace(first, rows=(replace(first.rows[0], upper=Fraction(k)),)) for k in (3, 6))]
    wanted = 3
    expected: list[Fraction] = []
    earlier: list[set[str]] = []
    try:
        solutions = mip.solve(siblings, {}, wanted, difference).solutions
    except InfeasibleError:
        assert not any(map(feasible, siblings))
        return
    at_most = min(math.floor((1 - Fraction(str(difference))) * len(first.sites)), len(first.sites) - 1)
    for number in range(wanted):
        allowed = [
            chosen
            for problem in siblings
            for chosen in feasible(problem)
            if all(sum(len(problem.by_id[one].sites) for one in other & set(chosen)) <= at_most for other in earlier)
        ]
        if number == len(solutions):
            assert not allowed
            return
        expected.append(min(map(first.objective_of, allowed)))
        assert solutions[number].objective_nats == float(expected[-1])
        assert set(solutions[number].items) in [set(chosen) for chosen in allowed]
        earlier.append(set(solutions[number].items))


@quick
@given(problems("everything"))
def test_the_front_is_the_optimum_at_every_limit(problem: Problem) -> None:
    free = replace(problem, rows=())
    allowed = feasible(free)
    if not allowed:
        with pytest.raises(InfeasibleError):
            front(free, "cost0")
        return
    whole, quantity = front(free, "cost0"), free.quantity("cost0")
    for limit in {quantity.value(chosen) for chosen in allowed}:
        point = whole.best_within(float(limit))
        assert point is not None
        assert whole.objective[point] == min(
            float(free.objective_of(chosen)) for chosen in allowed if quantity.value(chosen) <= limit
        )


@settings(quick, max_examples=60)
@given(problems("everything"))
def test_an_infeasible_search_names_a_smallest_set_and_values_that_work(problem: Problem) -> None:
    if feasible(problem) or not feasible(replace(problem, rows=())):
        return
    told = infeasible.core(problem, seconds=600)
    assert not feasible(replace(problem, rows=told))
    for size in range(1, len(told)):
        for fewer in itertools.combinations(problem.rows, size):
            assert feasible(replace(problem, rows=fewer)), f"{[row.written for row in fewer]} cannot hold either"
    for row in told:
        others = tuple(other for other in told if other is not row)
        without = feasible(replace(problem, rows=others))
        values = {row.quantity.value(chosen) for chosen in without}
        ends = infeasible.nearest(problem, row, others, seconds=600)
        assert all(end.proven for end in ends if end)
        below, above = (end.value if end else None for end in ends)
        lower, upper = row.lower, row.upper
        assert below == (max((v for v in values if v < lower), default=None) if lower is not None else None)
        assert above == (min((v for v in values if v > upper), default=None) if upper is not None else None)
