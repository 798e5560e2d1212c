"""Moves keep every bound, are valued as the surrogate values whole architectures, and lead downhill; by brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest
from search_factories import all_choices, make_problem

from puzzle.scoring.design import scores_by_site, singles
from puzzle.search.moves import Moves
from puzzle.search.problem import Chosen, Problem
from puzzle.search.surrogate import Surrogate
from puzzle.types import Site


def moves_of(problem: Problem, seed: int = 0) -> Moves:
    """Their surrogate is fitted to architectures whose KL is 0.3 to 3 times the sum of their scores, at random."""
    rng = np.random.default_rng(seed)
    some = random.Random(seed).sample(list(all_choices(problem)), 5)
    scores = scores_by_site(singles(problem.items, problem.objective))
    at = np.array([sum(scores[name] for name in one) for one in some])
    return Moves(problem, scores, Surrogate.fitted(at, at.sum(1) * rng.uniform(0.3, 3.0, 5)))


def told(moves: Moves, items: Chosen) -> float:
    """What the surrogate says of the whole."""
    return float(moves.surrogate.predict(sum(moves.scores[name] for name in items)[None])[0][0])


def problem_of(seed: int, num_sites: int = 4, wide: int = 3) -> Problem:
    """The first of this seed that has answers."""
    rng = random.Random(seed)
    while True:
        rows = rng.choice([("max",), ("max", "min"), ("eq",)])
        problem = make_problem(rng, num_sites, 3, rows, wide, conflicts=2)
        if feasible(problem):
            return problem


def feasible(problem: Problem) -> list[tuple[str, ...]]:
    return [problem.in_order(one) for one in all_choices(problem) if not problem.violations(one)]


def regions(problem: Problem, one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many exchanges of as few sites as can be lead from one to the other."""
    left = {site for name in set(one) ^ set(other) for site in problem.by_id[name].sites}
    found = 0
    while left:
        joined: set[Site] = {min(left)}
        while True:
            names = {n for n in set(one) ^ set(other) if joined & set(problem.by_id[n].sites)}
            grown = {site for name in names for site in problem.by_id[name].sites}
            if grown == joined:
                break
            joined = grown
        left -= joined
        found += 1
    return found


@pytest.mark.parametrize("seed", range(12))
def test_neighbours_keep_everything_and_are_valued_as_wholes(seed: int) -> None:
    problem = problem_of(seed)
    moves, allowed = moves_of(problem), feasible(problem)
    assert allowed
    start = allowed[seed % len(allowed)]
    found = list(moves.neighbours(start, most=10_000))
    assert len({items for _, items in found}) == len(found)
    for value, items in found:
        assert items in allowed and items != start
        assert value == pytest.approx(told(moves, items), rel=1e-9)
    assert [value for value, _ in found] == sorted(value for value, _ in found)


@pytest.mark.parametrize("seed", range(8))
def test_without_wide_items_neighbours_are_all_within_two_sites(seed: int) -> None:
    problem = problem_of(seed, wide=0)
    allowed = feasible(problem)
    start = allowed[0]
    near = {one for one in allowed if one != start and len(set(one) - set(start)) <= 2}
    assert {one for _, one in moves_of(problem).neighbours(start, 10_000)} == near


@pytest.mark.parametrize("seed", range(8))
def test_two_sites_end_at_the_optimum_from_anywhere(seed: int) -> None:
    problem = problem_of(seed, num_sites=2, wide=0)
    moves, allowed = moves_of(problem), feasible(problem)
    best = min(told(moves, one) for one in allowed)
    for start in allowed:
        assert told(moves, moves.descend(start)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_descent_never_worsens_nor_breaks_a_bound_and_ends_where_no_move_helps(seed: int) -> None:
    problem = problem_of(seed)
    moves, allowed = moves_of(problem, seed), feasible(problem)
    for start in allowed[:: max(1, len(allowed) // 5)]:
        end = moves.descend(start)
        value = told(moves, end)
        assert end in allowed
        assert value <= told(moves, start) * (1 + 1e-9)
        singles_only = all(len(problem.by_id[name].sites) == 1 for name in end)
        near = [
            one for one in allowed if singles_only and len(set(one)) == len(end) and regions(problem, end, one) <= 2
        ]
        assert all(told(moves, one) >= value * (1 - 1e-9) for one in near)


def test_a_run_that_is_left_keeps_the_rest_of_what_it_left_out() -> None:
    from puzzle.types import FfnSpec, Item

    sites = tuple(Site(layer, "ffn") for layer in range(3))
    items = [
        Item(f"{site}.{spec.kind}", (site,), (spec,)) for site in sites for spec in (FfnSpec("keep"), FfnSpec("skip"))
    ]
    run = Item("run", sites, (FfnSpec("skip"),) * 3)
    short = Item("short", sites[1:], (FfnSpec("skip"),) * 2)
    problem = Problem((*items, run, short), sites, {item.id: 0.1 * len(item.sites) for item in (*items, run, short)})
    found = {one for _, one in moves_of(problem).neighbours(("run",), 100)}
    assert ("L000.ffn.keep", "short") in found
    assert ("L000.ffn.skip", "L001.ffn.keep", "L002.ffn.skip") in found
