"""The front against brute force: every point of it, nothing else, and the choices behind the points."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from search_factories import all_choices, make_costs, make_file, make_items, make_problem, make_scores

from puzzle import style
from puzzle.search import problems, search
from puzzle.search.mip import solve
from puzzle.search.pareto import Front, draw, front, plot
from puzzle.search.problem import Problem, Quantity
from puzzle.space import SearchSpace
from puzzle.types import ConfigError, Conflict, Costs, InfeasibleError, Item, ModelShape
from puzzle.variants import params


def non_dominated(problem: Problem) -> list[tuple[Fraction, Fraction]]:
    """By definition: the points that no other point equals or beats in both."""
    quantity = problem.quantity("cost0")
    allowed = [chosen for chosen in all_choices(problem) if not replace(problem, rows=()).violations(chosen)]
    points = sorted({(quantity.value(chosen), problem.objective_of(chosen)) for chosen in allowed})
    kept: list[tuple[Fraction, Fraction]] = []
    for cost, objective in points:
        if not kept or objective < kept[-1][1]:
            kept.append((cost, objective))
    return kept


@pytest.mark.parametrize(("wide", "conflicts"), [(0, 0), (3, 0), (0, 6), (4, 8), (4, 30)])
@pytest.mark.parametrize("seed", range(6))
def test_front_is_that_of_brute_force(seed: int, wide: int, conflicts: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=5, choices=3, wide=wide, conflicts=conflicts)
    assert_front_is_exact(problem)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_conflicts_of_any_number_of_items_hold(seed: int, size: int) -> None:
    """Of one item, of several far apart, of some that cannot go together anyway, and of one that is not on offer."""
    rng = random.Random(seed)
    problem = make_problem(rng, num_sites=5, choices=2, wide=3)
    ids = [item.id for item in problem.items]
    conflicts = [Conflict(tuple(rng.sample(ids, size)), "no") for _ in range(3 if size == 1 else 12)]
    assert_front_is_exact(replace(problem, conflicts=(*conflicts, Conflict((ids[0], "elsewhere"), "no"))))


@pytest.mark.parametrize(("pairs", "runs"), [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_runs_of_layers_are_not_spelt_as_sums(shape: ModelShape, seed: int, pairs: bool, runs: int) -> None:
    """Where a run costs more than its parts, as where it costs less."""
    space = SearchSpace.parse({"attention": ("linear", "skip"), "ffn": ("skip",)}, shape, pairs=pairs, runs=runs)
    items, rng = space.items(), random.Random(seed)
    objective = {item.id: rng.uniform(0, 1) * len(item.sites) ** rng.uniform(0.5, 1.5) for item in items}
    sizes = {item.id: sum(params(spec, shape) for spec in item.specs) for item in items}
    quantity = Quantity("cost0", "params", sizes, whole=True)
    problem = Problem(items, shape.sites, objective, (), (quantity,), space.conflicts())
    found = assert_front_is_exact(problem)
    assert found.chosen(0) == ("L000-L002.skip",) if runs == 3 else len(found.chosen(0)) == 3


def assert_front_is_exact(problem: Problem) -> Front:
    expected = non_dominated(problem)
    found = front(problem, "cost0")
    assert found.cost == pytest.approx([float(cost) for cost, _ in expected], rel=1e-12)
    assert found.objective == pytest.approx([float(objective) for _, objective in expected], rel=1e-12)
    for point in range(len(found)):
        chosen = found.chosen(point)
        assert problem.in_order(chosen) == chosen
        assert replace(problem, rows=()).violations(chosen) == ()
        assert float(problem.quantity("cost0").value(chosen)) == pytest.approx(found.cost[point])
        assert float(problem.objective_of(chosen)) == pytest.approx(found.objective[point])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_costs_that_differ_only_by_the_order_of_addition_are_one_point(seed: int) -> None:
    """In floats (a + b) + c is not a + (b + c); points a rounding apart would all stay, and multiply."""
    problem = make_problem(random.Random(seed), num_sites=24, choices=3)
    three = (0.1, 0.1 * math.sqrt(2), 0.1 * math.pi)
    quantity = replace(
        problem.rows[0].quantity, coefficients={item.id: three[int(item.id[-1])] for item in problem.items}
    )
    found = front(replace(problem, rows=(), quantities=(quantity,)), "cost0")
    assert len(found) > 10
    assert np.diff(found.cost).min() > 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_front_and_solver_agree_where_brute_force_ends(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=40, choices=6)
    (row,) = problem.rows
    assert row.upper is not None
    whole = front(problem, "cost0")
    point = whole.best_within(float(row.upper))
    assert point is not None
    assert solve([problem], {}).solutions[0].objective_nats == pytest.approx(whole.objective[point], rel=1e-9)


def test_best_within_a_limit_is_the_searchs_answer(shape: ModelShape) -> None:
    items = make_items(shape)
    scores, costs = make_scores(items), make_costs(shape)
    chat = {"chat": {"isl": 128, "osl": 64, "batch_size": 4}}
    whole = front(problems(shape, items, scores, costs, make_file(workloads=chat))[0], "chat.e2e_ms")
    limit = float(whole.cost[0] + whole.cost[-1]) / 2
    file = make_file(workloads=chat, constraints={"chat.e2e_ms": limit})
    (solution,) = search(shape, items, scores, costs, file, {})
    point = whole.best_within(limit)
    assert point is not None
    assert whole.objective[point] == pytest.approx(solution.objective_nats)
    assert whole.best_within(float(whole.cost[0]) / 2) is None


def test_teacher_ends_the_front(shape: ModelShape) -> None:
    items = make_items(shape)
    whole = front(problems(shape, items, make_scores(items), Costs(), make_file())[0], "params")
    assert whole.teacher_cost == 2 * 128 * 64 + 64 + 3 * (16448 + 18496)
    assert whole.cost[-1] == whole.teacher_cost
    assert whole.objective[-1] == 0
    assert whole.chosen(-1) == tuple(f"{site}.keep" for site in shape.sites)
    without = [item for item in items if item.id != "L001.ffn.keep"]
    assert front(problems(shape, without, make_scores(items), Costs(), make_file())[0], "params").teacher_cost is None


def test_thinned_frame_keeps_both_ends(shape: ModelShape) -> None:
    items = make_items(shape)
    whole = front(problems(shape, items, make_scores(items), Costs(), make_file())[0], "params")
    assert len(whole) > 20
    frame = whole.frame(count=10)
    assert list(frame.columns) == ["point", "params", "kl_nats"]
    assert 5 <= len(frame) <= 10
    assert frame["point"].iloc[[0, -1]].tolist() == [0, len(whole) - 1]
    assert np.array_equal(frame["kl_nats"], whole.objective[frame["point"]])
    assert len(whole.frame()) == len(whole)


def test_what_is_no_plain_sum_is_refused(shape: ModelShape) -> None:
    items = make_items(shape)
    chat = make_file(workloads={"chat": {"isl": 128, "osl": 64, "batch_size": 4}})
    with pytest.raises(ConfigError, match="is a rate"):
        front(problems(shape, items, make_scores(items), make_costs(shape), chat)[0], "chat.req_per_s")
    with pytest.raises(ConfigError, match="nothing is known of 'speed'; known: params, "):
        front(problems(shape, items, make_scores(items), Costs(), make_file())[0], "speed")


def test_sites_that_cannot_be_covered_are_infeasible() -> None:
    problem = make_problem(random.Random(0), num_sites=3, choices=1)
    pairs = tuple(Item(f"pair{k}", problem.sites[k : k + 2], problem.items[0].specs * 2) for k in range(2))
    overlapping = replace(problem, items=pairs, objective={"pair0": 0.0, "pair1": 0.0}, rows=())
    with pytest.raises(InfeasibleError, match="covers every site exactly once$"):
        front(overlapping, "cost0")
    with pytest.raises(InfeasibleError, match="without a conflict"):
        front(replace(problem, conflicts=(Conflict((problem.items[0].id,), "no"),)), "cost0")


def test_plot_writes_a_png_with_and_without_a_chosen_point(shape: ModelShape, tmp_path: Path) -> None:
    items = make_items(shape)
    scores = make_scores(items)
    whole = front(problems(shape, items, scores, Costs(), make_file())[0], "params")
    (solution,) = search(shape, items, scores, Costs(), make_file(constraints={"params": "70%"}), {})
    plot(whole, tmp_path / "bare.png")
    style.save(draw(whole, solution), tmp_path / "marked.png")
    bare, marked = ((tmp_path / name).read_bytes() for name in ("bare.png", "marked.png"))
    assert bare.startswith(b"\x89PNG")
    assert marked.startswith(b"\x89PNG")
    assert bare != marked
