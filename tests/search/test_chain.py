"""Nested families against brute force: every link a reduction of the one before, none in sum better."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_file, make_items, make_scores, make_shape

from puzzle.search import chain as module
from puzzle.search import problems
from puzzle.search.chain import chain, even_limits, is_reduction
from puzzle.search.problem import Problem
from puzzle.space import SearchSpace
from puzzle.types import AttentionSpec, ConfigError, Costs, FfnSpec, InfeasibleError, Item, ModelShape, Site, Spec

SHAPE = make_shape(2)
GQA, WIDE = (lambda k: AttentionSpec("gqa", k)), (lambda n: FfnSpec("narrow", n))


def small_problem(seed: int, runs: int = 1, **limits: object) -> Problem:
    """Two layers whose scores are drawn at random around what is taken away, so nesting costs something."""
    names = {"attention": ("keep", "gqa-2", "linear", "skip"), "ffn": ("keep", "narrow-48", "skip")}
    if runs > 1:
        names = {"attention": ("gqa-2", "skip"), "ffn": ("skip",)}
    space = SearchSpace.parse(names, SHAPE, 1, runs=runs)
    items, rng = space.items(), random.Random(seed)
    file = make_file(constraints=limits)
    scores = make_scores([*items], seed)
    (problem,) = problems(SHAPE, items, scores, Costs(), file, space.conflicts())
    sizes = problem.quantity("params").coefficients  # the smaller the worse, but for chance
    lost = {item.id: 1 - sizes[item.id] / 18496 + rng.uniform(-0.4, 0.4) for item in items}
    return replace(problem, objective={item.id: lost[item.id] * len(item.sites) for item in items})


def specs_of(problem: Problem, chosen: tuple[str, ...]) -> dict[Site, Spec]:
    items: list[Item] = [problem.by_id[item_id] for item_id in chosen]
    return {site: spec for item in items for site, spec in zip(item.sites, item.specs, strict=True)}


def nested(problem: Problem, after: tuple[str, ...], before: tuple[str, ...]) -> bool:
    old, new = specs_of(problem, before), specs_of(problem, after)
    return all(is_reduction(new[site], old[site], SHAPE) for site in problem.sites)


def best_chain(problem: Problem, limits: tuple[Fraction, ...]) -> float:
    """By trying all."""
    cost = problem.quantity("params")
    fitting = [
        [chosen for chosen in all_choices(problem) if not problem.violations(chosen) and cost.value(chosen) <= limit]
        for limit in limits
    ]
    best = {chosen: problem.objective_of(chosen) for chosen in fitting[0]}
    for choices in fitting[1:]:
        best = {
            after: min(totals) + problem.objective_of(after)
            for after in choices
            if (totals := [total for before, total in best.items() if nested(problem, after, before)])
        }
    return float(min(best.values()))


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_chain_is_that_of_brute_force(seed: int, runs: int) -> None:
    problem = small_problem(seed, runs)
    limits = even_limits(problem, "params", 3)
    found = chain(problem, SHAPE, "params", limits)
    assert_chain(problem, found, limits)
    assert found.proven
    total = sum(link.objective for link in found.links)
    assert total == pytest.approx(best_chain(problem, limits))
    assert found.bound == pytest.approx(total)


def assert_chain(problem: Problem, found: module.Chain, limits: tuple[Fraction, ...]) -> None:
    cost = problem.quantity("params")
    assert [link.limit for link in found.links] == [float(limit) for limit in limits]
    for link, limit in zip(found.links, limits, strict=True):
        assert problem.violations(link.chosen) == ()
        assert link.cost == cost.value(link.chosen) <= limit
        assert link.objective == float(problem.objective_of(link.chosen))
        free = [problem.objective_of(one) for one in all_choices(problem)
                if not problem.violations(one) and cost.value(one) <= limit]  # fmt: skip
        assert link.free_objective == pytest.approx(float(min(free)))
        assert link.extra >= -1e-9
    assert all(nested(problem, after.chosen, before.chosen) for before, after in itertools.pairwise(found.links))


@pytest.mark.parametrize("seed", range(4))
def test_beyond_one_programme_the_better_greedy_is_a_chain_with_a_bound(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small_problem(seed)
    limits = even_limits(problem, "params", 3)
    monkeypatch.setattr(module, "MOST_VARIABLES", 10)
    found = chain(problem, SHAPE, "params", limits)
    assert_chain(problem, found, limits)
    assert not found.proven
    assert found.bound <= best_chain(problem, limits) + 1e-9 <= sum(link.objective for link in found.links) + 2e-9


def test_nesting_costs_something_where_the_free_optima_are_not_nested() -> None:
    extras = [max(link.extra for link in chain_of(seed).links) for seed in range(6)]
    assert max(extras) > 0.01
    assert min(extras) == pytest.approx(0, abs=1e-9)


def chain_of(seed: int) -> module.Chain:
    problem = small_problem(seed)
    return chain(problem, SHAPE, "params", even_limits(problem, "params", 3))


def test_the_files_bounds_hold_for_every_link() -> None:
    problem = small_problem(1, layers_with_attention={"min": 1})
    limits = even_limits(problem, "params", 2)
    found = chain(problem, SHAPE, "params", limits)
    assert_chain(problem, found, limits)


def test_what_is_no_chain_is_said() -> None:
    problem = small_problem(0)
    with pytest.raises(ConfigError, match="at least 2 architectures, found 1"):
        even_limits(problem, "params", 1)
    with pytest.raises(InfeasibleError, match="no architecture keeps params ≤ 5"):
        chain(problem, SHAPE, "params", (Fraction(10**9), Fraction(5)))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (AttentionSpec("keep"), GQA(2), True),
        (AttentionSpec("keep"), AttentionSpec("linear"), True),
        (AttentionSpec("keep"), AttentionSpec("window", window_tokens=8), True),
        (GQA(2), AttentionSpec("keep"), False),
        (GQA(2), GQA(1), True),
        (GQA(1), GQA(2), False),
        (GQA(2), AttentionSpec("linear"), False),
        (GQA(2), AttentionSpec("window", window_tokens=8), False),
        (GQA(2), AttentionSpec("skip"), True),
        (AttentionSpec("linear"), AttentionSpec("skip"), True),
        (AttentionSpec("skip"), AttentionSpec("linear"), False),
        (AttentionSpec("window", window_tokens=8), AttentionSpec("window", window_tokens=4), True),
        (AttentionSpec("window", window_tokens=8), AttentionSpec("window", window_tokens=4, sink_tokens=1), False),
        (FfnSpec("keep"), WIDE(48), True),
        (WIDE(48), WIDE(24), True),
        (WIDE(24), WIDE(48), False),
        (WIDE(48), FfnSpec("linear"), False),
        (WIDE(48), replace(WIDE(24), precision="fp8"), False),
        (WIDE(10), FfnSpec("skip"), True),
    ],
)
def test_what_a_reduction_is(before: Spec, after: Spec, expected: bool) -> None:
    assert is_reduction(after, before, SHAPE) == expected


def test_a_table_tells_the_loss_against_the_free_optimum(shape: ModelShape) -> None:
    items = make_items(shape)
    (problem,) = problems(shape, items, make_scores(items), Costs(), make_file())
    found = chain(problem, shape, "params", even_limits(problem, "params", 4))
    frame = found.frame(architectures=True)
    assert list(frame.columns) == ["limit", "params", "kl_nats", "free", "extra", "items"]
    assert list(found.frame().columns) == list(frame.columns)[:-1]
    assert frame["limit"].is_monotonic_decreasing
    assert (frame["kl_nats"] - frame["free"]).tolist() == pytest.approx(frame["extra"].tolist())
