"""The solver against brute force; exactness at the edge of its tolerance; messages for what cannot be."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_costs, make_file, make_items, make_problem, make_scores

from puzzle.search import linear, search
from puzzle.search.linear import Choice, minimise
from puzzle.search.mip import solve
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.search.programme import Effort
from puzzle.types import ConfigError, Conflict, Costs, FfnSpec, InfeasibleError, Item, ModelShape, OutOfTimeError, Site

KINDS = [
    {"rows": ("max",)},
    {"rows": ("max", "max")},
    {"rows": ("max", "min")},
    {"rows": ("eq",)},
    {"rows": ("max",), "wide": 3},
    {"rows": ("max", "eq"), "wide": 2, "conflicts": 3},
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_optimum_is_that_of_brute_force(kind: dict[str, object], seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=5, choices=3, **kind)  # type: ignore[arg-type]
    feasible = [chosen for chosen in all_choices(problem) if not problem.violations(chosen)]
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve([problem], {})
        return
    (solution,) = solve([problem], {"scores": "abc"}).solutions
    assert solution.objective_nats == pytest.approx(float(min(map(problem.objective_of, feasible))), abs=1e-12)
    assert problem.violations(solution.items) == ()
    assert solution.status == "optimal"
    assert solution.objective_nats - 1e-6 <= solution.bound_nats <= solution.objective_nats
    assert solution.totals == problem.totals(solution.items)
    assert solution.inputs == {"scores": "abc"}


def test_brute_force_cases_are_not_all_infeasible() -> None:
    problems = [make_problem(random.Random(seed), 5, 3, **kind) for kind in KINDS for seed in range(8)]  # type: ignore[arg-type]
    feasible = [any(not problem.violations(chosen) for chosen in all_choices(problem)) for problem in problems]
    assert 35 <= sum(feasible) < len(feasible)


def test_further_solutions_are_the_best_that_differ_enough() -> None:
    problem = make_problem(random.Random(5), num_sites=5, choices=3, wide=2)
    told: list[int] = []
    found = solve([problem], {}, count=3, min_difference=0.4, on_solution=lambda: told.append(len(told) + 1))
    assert told == [1, 2, 3]
    earlier: list[set[str]] = []
    for solution in found.solutions:
        different = [
            chosen
            for chosen in all_choices(problem)
            if not problem.violations(chosen) and all(shared_sites(problem, chosen, other) <= 3 for other in earlier)
        ]
        assert solution.objective_nats == pytest.approx(float(min(map(problem.objective_of, different))))
        assert set(solution.items) in [set(chosen) for chosen in different]
        earlier.append(set(solution.items))
    assert len(earlier) == 3
    assert found.note is None


def shared_sites(problem: Problem, chosen: tuple[str, ...], other: set[str]) -> int:
    return sum(len(problem.by_id[item_id].sites) for item_id in set(chosen) & other)


def test_fewer_solutions_than_asked_come_with_a_note() -> None:
    problem = make_problem(random.Random(1), num_sites=2, choices=2, rows=())
    found = solve([problem], {}, count=9, min_difference=0.0)
    assert len(found.solutions) == 4  # all there are, none twice
    assert len({solution.items for solution in found.solutions}) == 4
    assert found.note is not None
    assert "only 4 of 9" in found.note


def test_best_of_several_problems_wins_and_ties_go_to_the_first() -> None:
    problem = make_problem(random.Random(2), num_sites=4, choices=3)
    loose = replace(problem, rows=(), quantities=(Quantity("which", "", {}, 2.0),))
    loose_too = replace(loose, quantities=(Quantity("which", "", {}, 3.0),))
    assert solve([problem, loose, loose_too], {}).solutions[0].totals == {"which": 2.0}


def one_site(costs: dict[str, float], objective: dict[str, float], **bounds: Fraction) -> Problem:
    site = Site(0, "ffn")
    items = tuple(Item(name, (site,), (FfnSpec("narrow", k + 1),)) for k, name in enumerate(costs))
    row = Row(Quantity("cost", "u", costs), "cost as written", **bounds)
    return Problem(items, (site,), objective, (row,))


@pytest.mark.parametrize("excess", [1e-16, 1e-13, 1e-11, 1e-10])
def test_choice_over_the_bound_by_less_than_the_solvers_tolerance_is_not_returned(excess: float) -> None:
    limit = Fraction(1)
    over = math.nextafter(1.0, 2.0) if excess < 2e-16 else 1.0 + excess
    problem = one_site({"over": over, "under": 0.5}, {"over": 0.0, "under": 1.0}, upper=limit)
    assert solve([problem], {}).solutions[0].items == ("under",)


def test_choice_that_meets_the_bound_exactly_is_returned() -> None:
    """0.1 + 0.2 > 0.3 in floats: the bound is the exact sum, and not one bit less suffices."""
    sites = (Site(0, "ffn"), Site(1, "ffn"))
    items = tuple(Item(f"{site}.{kind}", (site,), (FfnSpec(kind),)) for site in sites for kind in ("linear", "skip"))
    costs = {"L000.ffn.linear": 0.1, "L001.ffn.linear": 0.2, "L000.ffn.skip": 0.0, "L001.ffn.skip": 0.0}
    objective = {item_id: 1.0 - cost for item_id, cost in costs.items()}
    exact = Fraction(0.1) + Fraction(0.2)

    def best(limit: Fraction) -> set[str]:
        rows = (Row(Quantity("cost", "u", costs), "cost", upper=limit),)
        return set(solve([Problem(items, sites, objective, rows)], {}).solutions[0].items)

    assert best(exact) == {"L000.ffn.linear", "L001.ffn.linear"}
    assert best(exact - Fraction(1, 2**80)) == {"L000.ffn.skip", "L001.ffn.linear"}


def test_more_choices_at_the_edge_than_are_forbidden_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty choices, each over by a hair and better than the one that fits: the bound itself is drawn in."""
    costs = {f"over-{k:02d}": 1.0 + (k + 1) * 1e-14 for k in range(60)} | {"under": 0.5}
    objective = {name: k / 100 for k, name in enumerate(costs)}
    solves: list[int] = []
    real = linear.solve
    monkeypatch.setattr(linear, "solve", lambda *given: (solves.append(1), real(*given))[1])
    (solution,) = solve([one_site(costs, objective, upper=Fraction(1))], {}).solutions
    assert solution.items == ("under",)
    assert len(solves) < 50
    assert solution.status == "feasible"
    assert solution.bound_nats < solution.objective_nats


def test_small_objectives_are_told_apart() -> None:
    """The solver's own absolute gap, 1e-6, is larger than these scores."""
    problem = one_site({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3e-9, "b": 1e-9, "c": 2e-9}, upper=Fraction(1))
    assert solve([problem], {}).solutions[0].items == ("b",)


def test_large_counts_are_exact() -> None:
    """8e9 parameters and a bound that one parameter too many breaks."""
    costs = {"over": 8_000_000_001.0, "at": 8_000_000_000.0, "under": 1.0}
    problem = one_site(costs, {"over": 0.0, "at": 1.0, "under": 2.0}, upper=Fraction(8_000_000_000))
    whole = replace(problem, rows=(replace(problem.rows[0], quantity=replace(problem.rows[0].quantity, whole=True)),))
    assert solve([whole], {}).solutions[0].items == ("at",)
    assert solve([problem], {}).solutions[0].items == ("at",)


@pytest.mark.parametrize("huge", [1e5, 1e7, 1e10, 1e15])
@pytest.mark.parametrize("of", ["a score", "a cost"])
def test_one_huge_number_does_not_hide_the_others(of: str, huge: float) -> None:
    """A solver's tolerances are relative to the largest number of a row, and of the objective."""
    checked = 0
    for seed, (num_sites, choices) in itertools.product(range(30), ((5, 4), (6, 2))):
        problem = make_problem(random.Random(seed), num_sites, choices)
        item_id = random.Random(seed).choice(problem.items).id
        if of == "a score":
            problem = replace(problem, objective={**problem.objective, item_id: huge})
        else:
            (row, *rows) = problem.rows
            spoilt = replace(row.quantity, coefficients={**row.quantity.coefficients, item_id: huge})
            problem = replace(problem, rows=(replace(row, quantity=spoilt), *rows))
        allowed = [chosen for chosen in all_choices(problem) if not problem.violations(chosen)]
        found = minimise(problem, problem.objective, problem.rows)
        assert (found is None) == (not allowed)
        if found is not None:
            assert float(found.total) == pytest.approx(float(min(map(problem.objective_of, allowed))), rel=1e-8)
            checked += 1
    assert checked >= 40


def test_same_problem_gives_the_same_answer() -> None:
    problem = make_problem(random.Random(3), num_sites=12, choices=5, rows=("max", "max"))
    first, second = (solve([problem], {}, count=3).solutions for _ in range(2))
    assert first == second


def infeasible(shape: ModelShape, **sections: object) -> str:
    items = make_items(shape)
    with pytest.raises(InfeasibleError) as caught:
        search(shape, items, make_scores(items), make_costs(shape), make_file(**sections), {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHAT = {"chat": {"isl": 128, "osl": 64, "batch_size": 4}}


def test_single_bound_that_cannot_hold_names_the_nearest_that_can(shape: ModelShape) -> None:
    message = infeasible(shape, workloads=CHAT, constraints={"memory_gib": 0.0001, "params": 1e9})
    match = re.fullmatch(r"memory_gib ≤ 0\.0001 cannot be met: the smallest possible is ([\d.]+) GiB", message)
    assert match is not None, message
    items = make_items(shape)
    file = make_file(workloads=CHAT, constraints={"memory_gib": float(match[1])})
    (solution,) = search(shape, items, make_scores(items), Costs(), file, {})  # what was advised works
    assert solution.totals["chat.memory_gib"] == pytest.approx(float(match[1]), rel=1e-3)
    assert solution.totals["params"] == 2 * 128 * 64 + 64


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        ({"layers_with_ffn": 4}, "layers_with_ffn ≥ 4 cannot be met: the largest possible is 3 layers"),
        ({"kv_heads_total": {"eq": 7}}, "kv_heads_total = 7 cannot be met: the nearest possible is 6 or 8 heads"),
        ({"output_tok_per_s": 1e6}, "output_tok_per_s ≥ 1000000 cannot be met: the largest possible is 6338 tok/s"),
    ],
)
def test_nearest_value_in_every_direction(shape: ModelShape, constraints: dict[str, object], expected: str) -> None:
    """Of the rate: all sites skipped, 4 ms and 63 steps of 0.578 ms for 256 tokens."""
    assert infeasible(shape, workloads=CHAT, constraints=constraints) == expected


def test_percentage_keeps_its_text_and_shows_its_value(shape: ModelShape) -> None:
    message = infeasible(shape, constraints={"params": "10%"})
    assert (
        message
        == "params ≤ 10% of the teacher = 12128 parameters cannot be met: the smallest possible is 16448 parameters"
    )


def test_bounds_that_conflict_are_named_without_the_innocent(shape: ModelShape) -> None:
    message = infeasible(
        shape, constraints={"kv_heads_total": 100, "params": {"max": 40_000}, "layers_with_ffn": {"min": 3}}
    )
    # rest 16448 + 3 narrow FFNs of 9280, the cheapest that count; two of them leave 35008
    assert message == (
        "these bounds cannot hold together: params ≤ 40000, layers_with_ffn ≥ 3; "
        "with the other, of params the smallest possible is 44288 parameters; "
        "with the other, of layers_with_ffn the largest possible is 2 layers"
    )


def test_bounds_of_one_metric_that_contradict_each_other_are_said_at_once(shape: ModelShape) -> None:
    message = infeasible(shape, constraints={"params": {"min": "90%", "max": 30_000}})
    assert re.fullmatch(
        r"params ≥ 90% of the teacher = \d+ parameters and params ≤ 30000 contradict each other; change one of them",
        message,
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            "something",
            r"these bounds .*; .* the smallest found in time is 44288 parameters; .* found in time is 2 layers",
        ),
        ("nothing", r"these bounds .*: params ≤ 40000, layers_with_ffn ≥ 3; (.* nothing near was found in time){2}"),
    ],
)
def test_an_explanation_has_its_time_and_says_what_was_not_proven_in_it(
    found: str, told: str, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sum of so many sizes is nearest to a number is a question for years."""
    limits: list[float | None] = []

    def out_of_time(
        problem: Problem, objective: Mapping[str, float], rows: Sequence[Row], effort: Effort
    ) -> Choice | None:
        limits.append(effort.seconds)
        choice = minimise(problem, objective, rows)
        if choice is None or not any(objective.values()):  # whether something is possible is soon known
            return choice
        if found == "nothing":
            raise OutOfTimeError("late", 0.0)
        return replace(choice, proven=False)

    monkeypatch.setattr("puzzle.search.infeasible.minimise", out_of_time)
    bounds = {"kv_heads_total": 100, "params": {"max": 40_000}, "layers_with_ffn": {"min": 3}}
    message = infeasible(shape, constraints=bounds, solver={"time_limit_s": 4})
    assert re.fullmatch(told, message)
    assert all(seconds is not None and 0 <= seconds <= 4 for seconds in limits)


def test_each_batch_size_says_why(shape: ModelShape) -> None:
    chat = {"chat": {**CHAT["chat"], "batch_size": [1, 4]}}
    message = infeasible(shape, workloads=chat, constraints={"memory_gib": 0.0001})
    assert message.startswith("chat batch size 1: memory_gib")
    assert "; chat batch size 4: memory_gib" in message


def test_sites_that_cannot_be_covered_say_so() -> None:
    sites = (Site(0, "ffn"), Site(1, "ffn"), Site(2, "ffn"))
    pairs = tuple(Item(f"pair{k}", sites[k : k + 2], (FfnSpec("skip"),) * 2) for k in range(2))
    with pytest.raises(InfeasibleError, match="no choice of items covers every site exactly once"):
        solve([Problem(pairs, sites, {"pair0": 0.0, "pair1": 0.0})], {})
    with pytest.raises(ConfigError, match="no variant is left for L002.ffn"):
        Problem(pairs[:1], sites, {"pair0": 0.0})


def test_conflicting_items_are_not_chosen_together() -> None:
    problem = make_problem(random.Random(4), num_sites=3, choices=2, rows=())
    (best,) = solve([problem], {}).solutions
    apart = replace(problem, conflicts=(Conflict(best.items, "not these three"),))
    (second,) = solve([apart], {}).solutions
    assert second.objective_nats > best.objective_nats
    everything = replace(problem, conflicts=tuple(Conflict((item.id,), f"no {item.id}") for item in problem.items))
    with pytest.raises(InfeasibleError, match="without a conflict"):
        solve([everything], {})


def test_minimise_tells_an_optimum_from_nothing() -> None:
    problem = one_site({"a": 2.0}, {"a": 0.5}, upper=Fraction(1))
    assert minimise(problem, problem.objective, problem.rows) is None
    choice = minimise(problem, problem.objective, ())
    assert choice is not None
    assert (choice.chosen, choice.total, choice.proven) == (("a",), Fraction(1, 2), True)


def test_what_a_target_cannot_load_is_not_chosen_and_an_infeasible_answer_says_so(shape: ModelShape) -> None:
    items = make_items(shape)
    file = {"constraints": {"params": 45_000}}
    (free,) = search(shape, items, make_scores(items), Costs(), make_file(**file), {})
    (served,) = search(shape, items, make_scores(items), Costs(), make_file(**file, serve_on=["vllm"]), {})
    assert served.objective_nats > free.objective_nats
    assert not [one for one in served.items if one.endswith("linear") or one == "L000.attention.skip"]
    message = infeasible(shape, constraints={"params": 20_000}, serve_on=["vllm"])
    assert message == (
        "params ≤ 20000 cannot be met: the smallest possible is 28800 parameters "
        "(serve_on leaves out 7 of 24 items; `puzzle constraints explain` says why)"
    )
