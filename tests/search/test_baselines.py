"""Each baseline keeps the bounds, stands where it must against the optimum, and does what its name says."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_file, make_items, make_problem, make_scores

from puzzle.search import problems
from puzzle.search.baselines import best_uniform, greedy, random_feasible
from puzzle.search.mip import solve
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.types import ConfigError, Conflict, InfeasibleError, ModelShape


def model_problem(shape: ModelShape, budget: str = "70%", seed: int = 0) -> Problem:
    items = make_items(shape)
    (problem,) = problems(shape, items, make_scores(items, seed), (), make_file(constraints={"params": budget}))
    return problem


def is_uniform(chosen: tuple[str, ...]) -> bool:
    return len({item_id.split(".", 1)[1] for item_id in chosen}) == 2


@pytest.mark.parametrize("seed", range(4))
def test_best_uniform_is_the_best_of_all_uniform_ones(shape: ModelShape, seed: int) -> None:
    problem = model_problem(shape, seed=seed)
    uniform = [ids for ids in all_choices(problem) if is_uniform(ids) and not problem.violations(ids)]
    assert len(uniform) > 3
    assert problem.objective_of(best_uniform(problem)) == min(map(problem.objective_of, uniform))


def test_uniform_leaves_out_a_variant_that_is_missing_somewhere(shape: ModelShape) -> None:
    problem = model_problem(shape)
    variant = best_uniform(problem)[0].split(".", 1)[1]
    lost = f"L001.{variant}"
    left = replace(problem, items=tuple(item for item in problem.items if item.id != lost))
    assert all(not item_id.endswith(variant) for item_id in best_uniform(left))


def test_random_ones_fit_differ_use_the_budget_and_depend_on_the_seed_alone(shape: ModelShape) -> None:
    problem = model_problem(shape)
    (row,) = problem.rows
    found = random_feasible(problem, seed=1, count=20)
    assert len(set(found)) == len(found) == 20
    assert random_feasible(problem, seed=1, count=20) == found
    assert random_feasible(problem, seed=2, count=20) != found
    assert row.upper is not None
    for chosen in found:
        assert problem.violations(chosen) == ()
        assert problem.in_order(chosen) == chosen
        # no single step fits any more, and the smallest step of this space is 4096 parameters
        used = row.quantity.value(chosen)
        for site, item_id in zip(problem.sites, chosen, strict=True):
            for item in problem.items:
                if item.sites == (site,):
                    step = Fraction(row.quantity.coefficients[item.id]) - Fraction(row.quantity.coefficients[item_id])
                    assert step <= 0 or used + step > row.upper


@pytest.mark.parametrize("seed", range(5))
def test_random_ones_keep_several_bounds(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=8, choices=4, rows=("max", "max", "min"), wide=2)
    relaxed = [
        Row(
            row.quantity,
            row.written,
            row.lower and row.lower * Fraction(1, 2),
            row.upper and row.upper * Fraction(3, 2),
        )
        for row in problem.rows
    ]
    loose = replace(problem, rows=tuple(relaxed))
    assert all(loose.violations(chosen) == () for chosen in random_feasible(loose, seed, count=5))


@pytest.mark.parametrize("seed", range(8))
def test_greedy_fits_and_lies_between_the_optimum_and_uniform_on_many_sites(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=40, choices=6)
    chosen = greedy(problem)
    assert problem.violations(chosen) == ()
    optimum = solve([problem], {}).solutions[0].objective_nats
    found = float(problem.objective_of(chosen))
    assert optimum - 1e-12 <= found <= 1.05 * optimum
    randoms = [float(problem.objective_of(ids)) for ids in random_feasible(problem, seed, count=3)]
    assert found < min(randoms)


def test_greedy_takes_the_hull_in_order_of_gain_per_cost() -> None:
    """By hand: gains per cost are 3 at site 0, whose middle item is off the hull, 2 and 0.5 at site 1."""
    problem = make_problem(random.Random(0), num_sites=2, choices=3)
    ids = [item.id for item in problem.items]
    costs = dict(zip(ids, (0.0, 1.0, 2.0, 0.0, 1.0, 3.0), strict=True))
    objective = dict(zip(ids, (6.0, 5.5, 0.0, 3.0, 1.0, 0.0), strict=True))

    def at(budget: int) -> list[int]:
        row = Row(Quantity("cost", "u", costs), "cost", upper=Fraction(budget))
        return [int(item_id[-1]) for item_id in greedy(replace(problem, objective=objective, rows=(row,)))]

    assert [at(budget) for budget in range(6)] == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 1], [2, 2]]


def test_greedy_refuses_what_it_cannot_do(shape: ModelShape) -> None:
    problem = model_problem(shape)
    for other in (
        replace(problem, rows=()),
        replace(problem, rows=problem.rows * 2),
        replace(problem, conflicts=(Conflict((problem.items[0].id,), "no"),)),
        make_problem(random.Random(0), num_sites=2, choices=2, rows=("min",)),
    ):
        with pytest.raises(ConfigError, match="exactly one upper bound"):
            greedy(other)


def test_budget_below_everything_is_infeasible(shape: ModelShape) -> None:
    problem = model_problem(shape, budget="1%")
    for baseline in (best_uniform, greedy, lambda given: random_feasible(given, 0, 1)):
        with pytest.raises(InfeasibleError, match="params ≤ 1%"):
            baseline(problem)


def test_site_without_single_items_is_refused() -> None:
    problem = make_problem(random.Random(0), num_sites=3, choices=1, wide=0)
    run = replace(problem.items[0], id="run", sites=problem.sites, specs=problem.items[0].specs * 3)
    only_run = replace(problem, items=(run,), objective={"run": 0.0}, rows=())
    with pytest.raises(ConfigError, match="over several sites only"):
        best_uniform(only_run)
