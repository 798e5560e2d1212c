"""Evolution finds what truth says is best, pays for every evaluation, and never returns what breaks a bound."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from search_factories import all_choices, make_file, make_items, make_problem, make_scores

from puzzle.search import problems
from puzzle.search.baselines import best_uniform
from puzzle.search.evolution import Step, evolve
from puzzle.search.mip import best_of
from puzzle.search.problem import Problem
from puzzle.types import ConfigError, Costs, InfeasibleError, ModelShape


class Truth:
    """Another objective than the scores': what an architecture truly costs, and how often it was asked."""

    def __init__(self, problem: Problem, seed: int = 7, noise: float = 0.0) -> None:
        rng = random.Random(seed)
        self.value = {item.id: rng.uniform(0, 1) for item in problem.items}
        self.noise, self.asked = noise, Counter[tuple[str, ...]]()

    def __call__(self, chosen: tuple[str, ...]) -> float:
        self.asked[chosen] += 1
        return self.of(chosen) + self.noise * random.Random(str(chosen)).uniform(-1, 1)

    def of(self, chosen: tuple[str, ...]) -> float:
        return sum(self.value[item_id] for item_id in chosen)


def model_problem(shape: ModelShape, budget: str = "70%") -> Problem:
    items = make_items(shape)
    (problem,) = problems(shape, items, make_scores(items), Costs(), make_file(constraints={"params": budget}))
    return problem


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_it_finds_nearly_the_best_and_is_never_worse_than_its_start(shape: ModelShape, seed: int) -> None:
    problem = model_problem(shape)
    truth = Truth(problem, seed)
    start = best_uniform(problem)
    found = evolve(problem, [Step(truth, 1.0, 1)], 300, seed)
    assert problem.violations(found) == ()
    assert sum(truth.asked.values()) <= 300
    assert set(truth.asked.values()) == {1}  # none is evaluated twice
    values = sorted(truth.of(chosen) for chosen in all_choices(problem) if not problem.violations(chosen))
    assert truth.of(found) < values[len(values) // 100] <= truth.of(start)
    assert evolve(problem, [Step(truth, 1.0, 1)], 300, seed) == found


def test_steps_with_few_tokens_come_first_and_cost_their_share(shape: ModelShape) -> None:
    problem = model_problem(shape)
    few, some, full = Truth(problem, noise=0.3), Truth(problem, noise=0.1), Truth(problem)
    found = evolve(problem, [Step(few, 1 / 8, 4), Step(some, 1 / 2, 2), Step(full, 1.0, 1)], 60)
    counts = [sum(truth.asked.values()) for truth in (few, some, full)]
    assert counts[0] > 2 * counts[1] > counts[1] > 0 < counts[2]
    assert counts[0] / 8 + counts[1] / 2 + counts[2] <= 60
    assert set(some.asked) <= set(few.asked)
    assert full.of(found) == min(map(full.of, full.asked))


def test_it_begins_where_it_is_told_and_with_nothing_to_spend_stays_there(shape: ModelShape) -> None:
    problem = model_problem(shape)
    truth = Truth(problem)
    best = best_of([problem])[1].chosen
    assert evolve(problem, [Step(truth, 1.0, 1)], 0.5, start=best) == best
    assert not truth.asked
    assert evolve(problem, [Step(lambda _: float("nan"), 1.0, 1)], 40, start=best) == best
    assert truth.of(evolve(problem, [Step(truth, 1.0, 1)], 40, start=best)) <= truth.of(best)
    assert next(iter(truth.asked)) == best
    assert truth.asked[best_uniform(problem)] == 0


def test_bounds_of_every_kind_are_kept() -> None:
    problem = make_problem(random.Random(3), num_sites=8, choices=4, rows=("max", "max", "min"), conflicts=2)
    loose = [replace(row, upper=row.upper and row.upper * 2, lower=row.lower and row.lower / 2) for row in problem.rows]
    problem = replace(problem, rows=tuple(loose))
    start = best_of([problem])[1].chosen
    asked: list[tuple[str, ...]] = []

    def evaluate(chosen: tuple[str, ...]) -> float:
        asked.append(chosen)
        return 0.0

    evolve(problem, [Step(evaluate, 1.0, 1)], 50, start=start)
    assert len(asked) > 10
    assert all(problem.violations(chosen) == () for chosen in asked)


def test_what_it_cannot_start_from_is_said(shape: ModelShape) -> None:
    with pytest.raises(InfeasibleError, match="none of 16 uniform"):
        evolve(model_problem(shape, "1%"), [Step(lambda _: 0.0, 1.0, 1)], 10)
    problem = make_problem(random.Random(0), num_sites=4, choices=2, wide=2)
    wide = next(item.id for item in problem.items if len(item.sites) > 1)
    start = next(chosen for chosen in all_choices(replace(problem, rows=())) if wide in chosen)
    with pytest.raises(ConfigError, match="several sites"):
        evolve(replace(problem, rows=()), [Step(lambda _: 0.0, 1.0, 1)], 10, start=start)
