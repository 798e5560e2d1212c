"""Fused FFNs in the search: optimum, front and prices against brute force, costs against those of what is built."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from search_factories import all_choices, make_costs, make_file, make_score

from puzzle import variants
from puzzle.capabilities import offer
from puzzle.config import FusionFile
from puzzle.search import baselines
from puzzle.search.constraints import problems
from puzzle.search.explain import alternatives, kept
from puzzle.search.linear import minimise
from puzzle.search.metrics import Setting, quantity
from puzzle.search.pareto import front
from puzzle.search.problem import Problem
from puzzle.space import SearchSpace
from puzzle.tables import ScoreTable
from puzzle.types import Costs, ModelShape, Site, Workload

FUSED = "L000-L002.fused-3x96"


@pytest.fixture
def space(shape: ModelShape) -> SearchSpace:
    offered = {"attention": ("skip",), "ffn": ("narrow-48", "skip")}
    fusion = FusionFile(max_layers=3, ffn=("keep", "narrow-48"))
    return SearchSpace.parse(offered, shape, runs=1, fusion=fusion)  # type: ignore[arg-type]


def problem_of(shape: ModelShape, space: SearchSpace, share: float, seed: int = 0) -> Problem:
    rng = random.Random(seed)
    scores = ScoreTable.of(
        make_score(item.id, rng.uniform(0.2, 1.0) * len(item.sites) ** rng.uniform(0.3, 1.0))
        for item in space.items()
        if not variants.is_teacher(item)
    )
    file = make_file(constraints={"params": f"{share:.0%}"})
    (problem,) = problems(shape, space.items(), scores, Costs(), file, space.conflicts())
    return problem


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_and_the_front_are_those_of_brute_force(
    shape: ModelShape, space: SearchSpace, share: float, seed: int
) -> None:
    problem = problem_of(shape, space, share, seed)
    unbound = replace(problem, rows=())
    free = [chosen for chosen in all_choices(problem) if not unbound.violations(chosen)]
    assert any("fused" in item_id for chosen in free for item_id in chosen)
    allowed = [chosen for chosen in free if not problem.violations(chosen)]
    found = minimise(problem, problem.objective, problem.rows)
    assert found is not None and found.proven and not problem.violations(found.chosen)
    assert found.total == min(map(problem.objective_of, allowed))
    point = front(problem, "params").best_within(float(problem.rows[0].upper or 0))
    assert point is not None
    assert front(problem, "params").objective[point] == pytest.approx(float(found.total), rel=1e-12)


def test_its_price_is_that_of_brute_force(shape: ModelShape, space: SearchSpace) -> None:
    problem = problem_of(shape, space, 0.6)
    best = minimise(problem, problem.objective, problem.rows)
    assert best is not None
    allowed = [chosen for chosen in all_choices(problem) if not problem.violations(chosen)]
    for forced in alternatives(problem, best.chosen, Site(1, "attention")):
        with_it = [problem.objective_of(chosen) for chosen in allowed if forced.item_id in chosen]
        expected = float(min(with_it) - best.total) if with_it else None
        assert forced.cost == pytest.approx(expected), forced.item_id
    assert all(forced.item_id in best.chosen for forced in kept(problem, best.chosen))


def test_simpler_ways_to_choose_do_without_it(shape: ModelShape, space: SearchSpace) -> None:
    """All but the one that counts parameters, which may take any item."""
    problem = problem_of(shape, space, 0.7)
    for chosen in (
        baselines.best_uniform(problem),
        baselines.published_greedy(problem),
        baselines.importance_depth(problem, [1.0, 2.0, 3.0]),
        *baselines.random_feasible(problem, 0, 3),
    ):
        assert not problem.violations(chosen) and not any("fused" in item_id for item_id in chosen)
    assert not problem.violations(baselines.most_params(problem))


def test_it_costs_what_one_wide_ffn_costs(shape: ModelShape, space: SearchSpace) -> None:
    """Parameters: the FFNs' less the norms that went; no KV cache but the first layer's; one wide shape's time."""
    item = next(item for item in space.fused if item.id == FUSED)
    costs = make_costs(shape)
    wide = [replace(cost, shape_id="ffn.narrow-288", ms=7 * cost.ms) for cost in costs.rows if cost.shape_id == "rest"]
    served = Workload("chat", 128, 64, (4,))
    setting = Setting(shape, served, 4, Costs((*costs.rows, *wide)))
    assert quantity("params", setting, [item]).coefficients[FUSED] == 3 * (3 * 64 * 96) + 64
    assert quantity("kv_cache_gib", setting, [item]).coefficients[FUSED] == 0
    assert quantity("layers_with_ffn", setting, [item]).coefficients[FUSED] == 1
    ttft = quantity("ttft_ms", setting, [item])
    assert ttft.coefficients[FUSED] == pytest.approx(7 * ttft.constant)
    weights = 2 * (3 * (3 * 64 * 96) + 64)
    more = (
        4 * 128 * (3 * 288 - (4 * 4 + 2 * 4) * 16) * 2
    )  # its activations in a prefill beyond the teacher's attention's
    assert quantity("memory_gib", setting, [item]).coefficients[FUSED] == pytest.approx((weights + more) / 2**30)


def test_every_reader_can_have_it(shape: ModelShape, space: SearchSpace) -> None:
    offered = offer(space.items(), ("transformers", "vllm", "mlx-lm"), shape)
    assert set(space.fused) <= set(offered.items)
    assert any(one.item.id == FUSED and one.spec.num_fused for one in offered.lowered)  # type: ignore[union-attr]
