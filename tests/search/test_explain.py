"""What an explanation says is what brute force says of the changed problem: prices, changes, forced alternatives."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import all_choices, make_problem

from puzzle.search.explain import _step, alternatives, alternatives_text, changes, explain, kept, text
from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, Item, Site

KINDS = [
    {"rows": ("max",)},
    {"rows": ("max", "min")},
    {"rows": ("max", "eq")},
    {"rows": ("max", "max"), "wide": 3, "conflicts": 3},
]


def best(problem: Problem) -> tuple[str, ...] | None:
    choice = minimise(problem, problem.objective, problem.rows)
    return None if choice is None else problem.in_order(choice.chosen)


def optimum(problem: Problem) -> Fraction | None:
    allowed = [problem.objective_of(chosen) for chosen in all_choices(problem) if not problem.violations(chosen)]
    return min(allowed, default=None)


def difference(problem: Problem, changed: Problem) -> float | None:
    before, after = optimum(problem), optimum(changed)
    assert before is not None
    return None if after is None else float(after - before)


def moved(problem: Problem, row: Row, lower: Fraction | None, upper: Fraction | None) -> Problem:
    rows = [replace(one, lower=lower, upper=upper) if one is row else one for one in problem.rows]
    return replace(problem, rows=tuple(rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_prices_are_those_of_brute_force(kind: dict[str, object], seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=5, choices=3, **kind)  # type: ignore[arg-type]
    chosen = best(problem)
    if chosen is None:
        return
    told = explain(problem, chosen, Fraction(1, 10))
    assert told.objective == float(problem.objective_of(chosen))
    for story, row in zip(told.rows, problem.rows, strict=True):
        assert story.row == row
        by, lower, upper = story.step, row.lower, row.upper
        if lower is not None and upper is not None:
            looser, tighter = (moved(problem, row, lower + sign * by, upper + sign * by) for sign in (1, -1))
        elif upper is not None:
            looser, tighter = (moved(problem, row, None, upper + sign * by) for sign in (1, -1))
        else:
            assert lower is not None
            looser, tighter = (moved(problem, row, lower - sign * by, None) for sign in (1, -1))
        assert story.looser == pytest.approx(difference(problem, looser), abs=1e-9)
        assert story.tighter == pytest.approx(difference(problem, tighter), abs=1e-9)
        free = replace(problem, rows=tuple(other for other in problem.rows if other is not row))
        assert story.without == pytest.approx(difference(problem, free), abs=1e-9)
        assert story.value == row.quantity.value(chosen)
        sides = [story.value - lower] if lower is not None else []
        sides += [upper - story.value] if upper is not None else []
        assert story.slack == min(sides) >= 0
        if story.tighter is not None:
            after = apply(problem, chosen, story.gives_way)
            assert tighter.violations(after) == ()
            assert float(problem.objective_of(after)) == pytest.approx(told.objective + story.tighter)
    assert text(told, problem).startswith(f"{told.objective:.4f} kl nats predicted\n\n")


def apply(problem: Problem, chosen: tuple[str, ...], made: object) -> tuple[str, ...]:
    ids = set(chosen)
    for change in made:  # type: ignore[attr-defined]
        assert set(change.before) <= ids
        assert {site for one in change.after for site in problem.by_id[one].sites} == set(change.sites)
        ids = ids - set(change.before) | set(change.after)
    return problem.in_order(ids)


@pytest.mark.parametrize("seed", range(4))
def test_changes_are_the_smallest_groups_of_sites(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=5, choices=2, rows=(), wide=4)
    ways = list(all_choices(problem))
    rng = random.Random(seed)
    for _ in range(20):
        before, after = rng.choice(ways), rng.choice(ways)
        made = changes(problem, before, after)
        assert set(apply(problem, before, made)) == set(after)
        assert sum(len(change.sites) for change in made) == len({site for change in made for site in change.sites})
        singles = [change for change in made if len(change.before) == len(change.after) == 1]
        assert all(problem.by_id[change.before[0]].sites == change.sites for change in singles)


@pytest.mark.parametrize("seed", range(4))
def test_forced_alternatives_are_those_of_brute_force(seed: int) -> None:
    problem = make_problem(random.Random(seed), num_sites=5, choices=3, rows=("max", "min"), wide=2, conflicts=2)
    chosen = best(problem)
    if chosen is None:
        return
    for site in problem.sites:
        found = alternatives(problem, chosen, site)
        assert {forced.item_id for forced in found} == {item.id for item in problem.items if site in item.sites}
        for forced in found:
            allowed = [ids for ids in all_choices(problem) if not problem.violations(ids) and forced.item_id in ids]
            costs = [float(problem.objective_of(ids) - problem.objective_of(chosen)) for ids in allowed]
            assert forced.cost == pytest.approx(min(costs, default=None), abs=1e-9)
        costs_found = [math.inf if forced.cost is None else forced.cost for forced in found]
        assert costs_found == sorted(costs_found)
        assert "chosen" in alternatives_text(found, problem)
    with pytest.raises(ConfigError, match="no such site"):
        alternatives(problem, chosen, Site(9, "ffn"))


def attention_problem(limit: int) -> Problem:
    """Two layers of an attention and an FFN; keeping an attention costs 4, an FFN 2; pairs keep an attention too."""
    sites = tuple(Site(layer, part) for layer in range(2) for part in ("attention", "ffn"))  # type: ignore[arg-type]
    items, cost, score = [], {}, {}
    for site in sites:
        for kind in ("keep", "skip"):
            spec = AttentionSpec(kind) if site.part == "attention" else FfnSpec(kind)  # type: ignore[arg-type]
            items.append(Item(f"{site}.{kind}", (site,), (spec,)))
            cost[items[-1].id] = 0.0 if kind == "skip" else 4.0 if site.part == "attention" else 2.0
            score[items[-1].id] = 0.0 if kind == "keep" else 1.0 + site.layer if site.part == "attention" else 0.5
    items.append(Item("L000.pair", sites[:2], (AttentionSpec("keep"), FfnSpec("skip"))))
    cost["L000.pair"], score["L000.pair"] = 4.0, 0.4
    row = Row(Quantity("memory_gib", "GiB", cost), f"memory_gib ≤ {limit}", upper=Fraction(limit))
    return Problem(tuple(items), sites, score, (row,), (row.quantity,))


def test_kept_attentions_are_priced_without_any_item_that_keeps_them() -> None:
    """At 8 of 12 both attentions stay: without layer 0's, both FFNs come back: +1 - 0.4 - 0.5."""
    problem = attention_problem(limit=8)
    chosen = best(problem)
    assert chosen == ("L000.pair", "L001.attention.keep", "L001.ffn.skip")
    first, second = kept(problem, chosen)
    assert (first.item_id, second.item_id) == ("L000.pair", "L001.attention.keep")
    assert first.cost == pytest.approx(0.1)
    assert first.instead == ("L000.attention.skip", "L000.ffn.keep")
    assert second.cost == pytest.approx(1.1)
    told = text(explain(problem, chosen), problem)
    assert "L000.pair                   +0.1000 kl nats, skip + keep instead, 1 other change" in told
    assert "memory_gib ≤ 8: 8 GiB, 0 from the bound: binds; without it -0.9000 kl nats" in told


def test_a_bound_that_does_not_matter_says_so_and_nothing_fits_below_it() -> None:
    problem = attention_problem(limit=12)
    chosen = best(problem)
    assert chosen is not None
    assert "12 GiB, 0 from the bound: does not bind" in text(explain(problem, chosen), problem)
    empty = attention_problem(limit=0)
    (story,) = explain(empty, best(empty) or ()).rows
    assert story.tighter is None
    assert "1 GiB less: nothing fits" in text(explain(empty, best(empty) or ()), empty)


@pytest.mark.parametrize(
    ("bound", "whole", "step"),
    [(40.0, False, "0.5"), (0.03, False, "0.0002"), (5e9, True, "50000000"), (3.0, True, "1"), (80.0, False, "1")],
)
def test_steps_are_round(bound: float, whole: bool, step: str) -> None:
    (row,) = attention_problem(limit=12).rows
    sized = replace(row, quantity=replace(row.quantity, whole=whole), upper=Fraction(bound))
    assert _step(sized, Fraction(1, 100)) == Fraction(step)


def test_a_step_leaves_a_rate_positive() -> None:
    (row,) = attention_problem(limit=12).rows
    rate = replace(row, quantity=replace(row.quantity, numerator=1.0), lower=Fraction(4), upper=None)
    assert _step(rate, Fraction(9, 10)) == 2
