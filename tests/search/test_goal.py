"""The inverse question, a cost minimised while the quality is bounded: against brute force, exact, explained."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_costs, make_file, make_items, make_problem, make_score, make_scores

from puzzle.search import problems, search
from puzzle.search.goal import Goal, goal_of
from puzzle.search.mip import solve
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.tables import ScoreTable
from puzzle.types import ConfigError, Costs, InfeasibleError, ModelShape, Solution

CHAT = {"chat": {"isl": 128, "osl": 64, "batch_size": 4}}


def inverse(seed: int, kind: str, **features: int) -> Problem:
    """A random problem that minimises its first cost (or maximises a rate over it); its objective is bounded."""
    rng = random.Random(seed)
    problem = make_problem(rng, num_sites=5, choices=3, rows=("max", "max"), **features)
    (first, second) = problem.rows
    whole = {item_id: float(rng.randint(0, 2)) for item_id in problem.objective}  # many that cost the same
    cost = {
        "sum": first.quantity,
        "whole": replace(first.quantity, coefficients=whole, whole=True),
        "rate": replace(first.quantity, numerator=1000.0),
    }[kind]
    quality = Quantity("kl_nats", "nats", problem.objective)
    bound = Row(quality, "kl_nats", upper=Fraction(rng.uniform(1.3, 3.0)))
    return replace(problem, rows=(bound, second), cost=cost, quantities=(cost, quality))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["sum", "whole", "rate"])
@pytest.mark.parametrize("features", [{}, {"wide": 3}, {"wide": 2, "conflicts": 3}], ids=str)
def test_cheapest_and_then_best_are_those_of_brute_force(kind: str, seed: int, features: dict[str, int]) -> None:
    problem = inverse(seed, kind, **features)
    assert problem.cost is not None
    feasible = [chosen for chosen in all_choices(problem) if not problem.violations(chosen)]
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve([problem], {})
        return
    (solution,) = solve([problem], {}).solutions
    least = min(problem.cost.linear(chosen) for chosen in feasible)
    best = min(problem.objective_of(chosen) for chosen in feasible if problem.cost.linear(chosen) == least)
    assert problem.violations(solution.items) == ()
    assert problem.cost.linear(solution.items) == least
    assert solution.objective_nats == pytest.approx(float(best), abs=1e-12)
    assert solution.status == "optimal"
    assert solution.minimised == problem.cost.name
    assert solution.totals[problem.cost.name] == float(problem.cost.of_linear(least))
    assert solution.bound_nats is None
    assert solution.cost_bound == pytest.approx(solution.totals[problem.cost.name], rel=1e-6)


def test_not_all_of_those_are_infeasible_and_some_have_ties() -> None:
    made = [inverse(seed, "whole", **features) for seed in range(8) for features in ({}, {"wide": 3})]
    feasible = [[chosen for chosen in all_choices(one) if not one.violations(chosen)] for one in made]
    assert sum(map(bool, feasible)) >= 10
    ties = 0
    for problem, choices in zip(made, feasible, strict=True):
        assert problem.cost is not None
        costs = sorted(problem.cost.linear(chosen) for chosen in choices)
        ties += len(costs) > 1 and costs[0] == costs[1]
    assert ties >= 5


def solution_of(shape: ModelShape, scores: ScoreTable | None = None, **sections: object) -> Solution:
    items = make_items(shape)
    (solution,) = search(shape, items, scores or make_scores(items), make_costs(shape), make_file(**sections), {})
    return solution


def test_a_file_turned_round_gives_the_same_architecture(shape: ModelShape) -> None:
    straight = solution_of(shape, constraints={"params": "60%"})
    turned = solution_of(shape, objective="params", constraints={"kl_nats": straight.objective_nats + 1e-9})
    assert turned.totals["params"] <= straight.totals["params"]
    assert turned.objective_nats <= straight.objective_nats + 1e-9
    assert straight.bound_nats is not None
    assert (straight.minimised, straight.cost_bound, straight.objective_name) == (None, None, "kl_nats")
    assert (turned.objective_name, turned.minimised) == ("kl_nats", "params")
    assert turned.totals["kl_nats"] == turned.objective_nats
    assert turned.cost_bound == turned.totals["params"]
    assert turned.objective_se == pytest.approx(straight.objective_se or 0)


def test_a_rate_is_made_as_large_as_possible_and_the_batch_size_with_it(shape: ModelShape) -> None:
    chat = {"chat": {**CHAT["chat"], "batch_size": [1, 4]}}
    found = solution_of(shape, workloads=chat, objective="chat.output_tok_per_s", constraints={"kl_nats": {"max": 1.5}})
    alone = [
        solution_of(
            shape,
            workloads={"chat": {**CHAT["chat"], "batch_size": size}},
            objective="output_tok_per_s",
            constraints={"kl_nats": {"max": 1.5}},
        ).totals["chat.output_tok_per_s"]
        for size in (1, 4)
    ]
    assert found.totals["chat.output_tok_per_s"] == max(alone) > min(alone)
    assert found.cost_bound == pytest.approx(max(alone))


def test_the_time_of_the_least_batch_size_is_the_shortest(shape: ModelShape) -> None:
    chat = {"chat": {**CHAT["chat"], "batch_size": [4, 1]}}
    found = solution_of(shape, workloads=chat, objective="chat.e2e_ms", constraints={"kl_nats": {"max": 1.5}})
    assert found.totals["chat.batch_size"] == 1


def test_two_qualities_can_be_bounded_at_once(shape: ModelShape) -> None:
    items = make_items(shape)
    kl = make_scores(items, seed=1)
    ce = [make_score(item_id, 2 - score.mean, "ce_delta") for (item_id, _), score in kl.scores.items()]
    both = ScoreTable.of([*kl.scores.values(), *ce])
    limits = {"kl_nats": {"max": 3.0}, "ce_delta_nats": {"max": 2.0}}
    found = solution_of(shape, both, objective="params", constraints=limits)
    free = solution_of(shape, both, objective="params", constraints={"kl_nats": {"max": 3.0}})
    assert free.totals["params"] < found.totals["params"]
    assert found.totals["kl_nats"] <= 3.0
    assert found.totals["ce_delta_nats"] <= 2.0
    assert found.totals["ce_delta_nats"] == pytest.approx(
        sum(both.scores[one, "ce_delta"].mean for one in found.items if (one, "ce_delta") in both.scores)
    )


def test_the_quality_bound_is_exact() -> None:
    """A sum of scores over the bound by less than the solver's tolerance is not an answer."""
    problem = inverse(7, "sum")
    assert problem.cost is not None
    chosen = solve([problem], {}).solutions[0].items
    value = problem.objective_of(chosen)
    (row, *others) = problem.rows
    at = replace(problem, rows=(replace(row, upper=value), *others))
    assert solve([at], {}).solutions[0].items == chosen
    below = replace(problem, rows=(replace(row, upper=value - Fraction(1, 2**70)), *others))
    assert problem.objective_of(solve([below], {}).solutions[0].items) < value


def test_a_quality_that_cannot_be_had_is_explained(shape: ModelShape) -> None:
    items = make_items(shape)
    sections: dict[str, object] = {"objective": "params", "constraints": {"kl_nats": 0.01, "kv_heads_total": 2}}
    with pytest.raises(InfeasibleError) as caught:
        search(shape, items, make_scores(items), Costs(), make_file(**sections), {})
    message = str(caught.value)
    match = re.fullmatch(
        r"these bounds cannot hold together: kl_nats ≤ 0\.01, kv_heads_total ≤ 2; "
        r"with the other, of kl_nats the smallest possible is ([\d.]+) nats; "
        r"with the other, of kv_heads_total the smallest possible is 12 heads",
        message,
    )
    assert match is not None, message
    advised = {"kl_nats": float(match[1]), "kv_heads_total": 2}  # what was advised works
    (found,) = search(shape, items, make_scores(items), Costs(), make_file(objective="params", constraints=advised), {})
    assert found.objective_nats == pytest.approx(float(match[1]), rel=1e-3)


def test_further_answers_differ_there_too(shape: ModelShape) -> None:
    items = make_items(shape)
    file = make_file(objective="params", constraints={"kl_nats": 2.0}, solutions={"count": 3, "min_difference": 0.5})
    found = search(shape, items, make_scores(items), Costs(), file, {})
    assert len(found) == 3
    assert [one.totals["params"] for one in found] == sorted(one.totals["params"] for one in found)
    assert all(len(set(a.items) & set(b.items)) <= 3 for a in found for b in found if a is not b)
    assert all(one.totals["kl_nats"] <= 2.0 for one in found)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": "params"}, "params is a cost.*bound the quality under constraints, e.g. kl_nats: {max: 0.1}"),
        ({"objective": "params", "constraints": {"kl_nats": {"min": 0.1}}}, "bound the quality"),
        ({"objective": "layers_with_ffn", "constraints": {"kl_nats": 1}}, "layers_with_ffn is no cost"),
        ({"objective": "e2e_ms", "constraints": {"kl_nats": 1}}, "e2e_ms needs a workload"),
        (
            {"objective": "chta.e2e_ms", "constraints": {"kl_nats": 1}, "workloads": CHAT},
            "objective: unknown workload 'chta'; did you mean 'chat'",
        ),
        ({"objective": "chat.params", "constraints": {"kl_nats": 1}, "workloads": CHAT}, "write 'params' alone"),
        (
            {"objective": "e2e_ms", "constraints": {"kl_nats": 1}, "workloads": {**CHAT, "long": CHAT["chat"]}},
            "e2e_ms of which workload\\? Write e.g. chat.e2e_ms",
        ),
        ({"constraints": {"kl_nats": "50%"}}, "the teacher's own kl_nats is 0: there is nothing to take 50% of"),
        ({"constraints": {"kl_nats": {"eq": 1}}}, "eq is for whole numbers"),
        ({"constraints": {"kl_nats": -0.1}}, "kl_nats is never below 0, found -0.1"),
        ({"constraints": {"params": -5}}, "params is never below 0, found -5"),
        ({"constraints": {"chat.kl_nats": 1}, "workloads": CHAT}, "kl_nats is the model's, not a workload's"),
        ({"constraints": {"kl_nat": 1}}, "unknown metric 'kl_nat'; did you mean 'kl_nats'"),
    ],
)
def test_mistakes_are_named(shape: ModelShape, sections: dict[str, object], message: str) -> None:
    items = make_items(shape)
    with pytest.raises(ConfigError, match=message):
        problems(shape, items, make_scores(items), make_costs(shape), make_file(**sections))


def test_a_task_of_the_users_own_can_be_the_quality(shape: ModelShape) -> None:
    items = make_items(shape)
    mine = ScoreTable.of(make_score(item.id, 1.0, "mine") for item in items if item.specs[0].kind != "keep")
    found = solution_of(shape, mine, objective="params", constraints={"mine": {"max": 2}})
    assert found.objective_name == "mine"
    assert found.objective_nats == 2.0
    with pytest.raises(ConfigError, match="unknown metric 'mine'"):
        solution_of(shape, objective="params", constraints={"mine": {"max": 2}, "kl_nats": 1})


def test_goals() -> None:
    assert goal_of(make_file()) == Goal("kl_nats")
    file = make_file(objective="memory_gib", workloads=CHAT, constraints={"params": 5, "ce_delta_nats": {"max": 1}})
    assert goal_of(file) == Goal("ce_delta_nats", "memory_gib", "chat")
    assert goal_of(make_file(objective="weights_gib", constraints={"kl_nats": 1})) == Goal("kl_nats", "weights_gib")
