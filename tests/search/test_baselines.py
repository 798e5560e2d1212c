"""Each baseline keeps the bounds, stands where it must against the optimum, and does what its name says."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_file, make_items, make_problem, make_score, make_scores

from puzzle.search import problems
from puzzle.search.baselines import (
    best_uniform,
    greedy,
    importance_depth,
    most_params,
    published_greedy,
    random_feasible,
)
from puzzle.search.mip import solve
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.space import SearchSpace
from puzzle.tables import ScoreTable
from puzzle.types import ConfigError, Conflict, Costs, InfeasibleError, ModelShape
from puzzle.variants import is_teacher


def model_problem(shape: ModelShape, budget: str = "70%", seed: int = 0) -> Problem:
    items = make_items(shape)
    (problem,) = problems(shape, items, make_scores(items, seed), Costs(), make_file(constraints={"params": budget}))
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


@pytest.mark.parametrize("seed", range(6))
def test_published_greedy_keeps_its_budgets_and_never_beats_the_optimum(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=20, choices=5, rows=("max", "max"))
    loose = replace(problem, rows=tuple(replace(row, upper=row.upper and row.upper * 2) for row in problem.rows))
    chosen = published_greedy(loose)
    assert loose.violations(chosen) == ()
    assert loose.in_order(chosen) == chosen
    assert solve([loose], {}).solutions[0].objective_nats <= float(loose.objective_of(chosen)) + 1e-12


def test_published_greedy_goes_from_the_easiest_layer_and_hands_on_what_is_left() -> None:
    """By hand: budget 6 for three layers. Layer 1 is easiest: of its share of 2 it takes 0; layer 2 has 3, takes 3."""
    problem = make_problem(random.Random(0), num_sites=3, choices=2)
    ids = [item.id for item in problem.items]
    costs = dict(zip(ids, (4.0, 1.0, 2.5, 0.0, 3.0, 1.0), strict=True))
    objective = dict(zip(ids, (0.0, 9.0, 0.0, 1.0, 0.0, 5.0), strict=True))
    row = Row(Quantity("cost", "u", costs), "cost", upper=Fraction(6))
    chosen = published_greedy(replace(problem, objective=objective, rows=(row,)))
    assert [item_id[-1] for item_id in chosen] == ["1", "1", "0"]
    with pytest.raises(InfeasibleError, match="the published greedy does not keep cost"):
        published_greedy(replace(problem, objective=objective, rows=(replace(row, upper=Fraction(1)),)))
    with pytest.raises(ConfigError, match="bound from below"):
        published_greedy(replace(problem, rows=(replace(row, lower=Fraction(1)),)))


def test_published_greedy_takes_pairs_and_single_items(shape: ModelShape) -> None:
    problem = model_problem(shape, budget="60%")
    chosen = published_greedy(problem)
    assert problem.violations(chosen) == ()
    space = SearchSpace.parse({"attention": ("gqa-2", "skip"), "ffn": ("narrow-48", "skip")}, shape, pairs=True)
    items = space.items()
    scores = ScoreTable.of(make_score(item.id, 0.5) for item in items if not is_teacher(item))
    (pairs,) = problems(shape, items, scores, Costs(), make_file(constraints={"params": "60%"}))
    assert len(published_greedy(pairs)) == shape.num_layers


@pytest.mark.parametrize("seed", range(4))
def test_most_params_is_the_largest_that_fits(shape: ModelShape, seed: int) -> None:
    problem = model_problem(shape, seed=seed)
    params = problem.quantity("params")
    fitting = [ids for ids in all_choices(problem) if not problem.violations(ids)]
    assert params.value(most_params(problem)) == max(map(params.value, fitting))


def test_importance_depth_leaves_out_the_least_important_layers_first(shape: ModelShape) -> None:
    problem = model_problem(shape, budget="75%")
    chosen = importance_depth(problem, [0.5, 0.1, 0.9])
    assert [item_id for item_id in chosen if item_id.endswith("skip")] == ["L001.attention.skip", "L001.ffn.skip"]
    assert importance_depth(model_problem(shape, budget="100%"), [1.0, 1.0, 1.0]) == tuple(
        f"{site}.keep" for site in shape.sites
    )
    with pytest.raises(ConfigError, match="expected 3 finite numbers, one a layer, found 2"):
        importance_depth(problem, [1.0, 2.0])
    with pytest.raises(InfeasibleError, match="leaving out whole layers"):
        importance_depth(model_problem(shape, budget="1%"), [1.0, 2.0, 3.0])


def test_importance_depth_spells_runs_as_they_are_offered(shape: ModelShape) -> None:
    space = SearchSpace.parse({"attention": ("skip",), "ffn": ("skip",)}, shape, runs=2)
    items = space.items()
    scores = ScoreTable.of(make_score(item.id, 0.5) for item in items if not is_teacher(item))
    file = make_file(constraints={"params": "50%"})
    (problem,) = problems(shape, items, scores, Costs(), file, space.conflicts())
    assert importance_depth(problem, [0.5, 0.1, 0.9])[0] == "L000-L001.skip"
