"""Refine on a world whose interactions are known: what it finds, what it costs, and that a stop repeats nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from search_factories import all_choices, make_problem

from puzzle.scoring.design import Floats, scores_by_site, singles
from puzzle.search import mip
from puzzle.search.problem import Chosen, Problem
from puzzle.search.refine import SURE, Settings, refine
from puzzle.search.surrogate import Surrogate
from puzzle.types import ConfigError


class Killed(BaseException):
    """Like a kill."""


@dataclass
class World:
    """Sites act together by a rho of their own; remembers what was measured, and is killed after so many."""

    problem: Problem
    seed: int
    kill_after: int = 1_000_000
    known: dict[Chosen, tuple[float, ...]] = field(default_factory=dict)
    measured: list[Chosen] = field(default_factory=list)

    @cached_property
    def rho(self) -> Floats:
        size = len(self.problem.sites)
        return np.triu(np.random.default_rng(self.seed).normal(-0.05, 0.35, (size, size)), 1)

    def true(self, items: Chosen) -> float:
        amplitudes = np.sqrt([self.problem.objective[name] for name in items])
        return max(0.05, float(amplitudes @ amplitudes + 2 * amplitudes @ self.rho @ amplitudes))

    def measure(self, asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        for items in asked:
            if items not in self.known:
                if len(self.measured) >= self.kill_after:
                    raise Killed
                self.measured.append(items)
                self.known[items] = (self.true(items) * 0.99, self.true(items) * 1.01)
        return [self.known[items] for items in asked]


def make_world(seed: int, num_sites: int = 5) -> World:
    """The first problem of this seed that is not too tight."""
    rng = random.Random(seed)
    while True:
        problem = make_problem(rng, num_sites, 3)
        if problem.rows[0].upper is not None and problem.rows[0].upper > 1 + 4 * num_sites:
            return World(problem, seed)


def answers_of(problem: Problem) -> Callable[[int], list[Chosen]]:
    return lambda count: [one.items for one in mip.solve([problem], {}, count, 0.2).solutions]


@pytest.mark.parametrize("seed", range(3))
def test_the_interactions_are_learnt_and_the_optimum_found(seed: int) -> None:
    world, settings = make_world(seed), Settings(30)
    answers = answers_of(world.problem)
    found = refine(world.problem, answers, world.measure, settings)
    of_answers = min(world.true(items) for items in answers(settings.first))
    allowed = [one for one in all_choices(world.problem) if not world.problem.violations(one)]
    best = min(map(world.true, map(world.problem.in_order, allowed)))
    assert found.best.true <= of_answers
    assert found.best.true == pytest.approx(best, rel=0.02)
    assert len(world.measured) == len(found.trials) <= 30
    assert all(not world.problem.violations(trial.items) for trial in found.trials)
    assert len({trial.items for trial in found.trials}) == len(found.trials)


def test_refine_beats_the_answers_where_sums_are_wrong() -> None:
    gains = []
    for seed in range(2):
        world, settings = make_world(seed, num_sites=12), Settings(40)
        answers = answers_of(world.problem)
        found = refine(world.problem, answers, world.measure, settings)
        of_answers = min(map(world.true, answers(settings.first)))
        gains.append(1 - found.best.true / of_answers)
    assert np.mean(gains) > 0.05


def test_where_the_model_knows_of_nothing_better_it_is_shown_further_answers() -> None:
    world, settings = make_world(1, num_sites=9), Settings(24)
    answers = answers_of(world.problem)
    first = answers(settings.first)
    unlike = answers(settings.first + 2)[-1]

    def sums_but_for_one(asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        values = [float(world.problem.objective_of(items)) * (0.1 if items == unlike else 1) for items in asked]
        return [(0.99 * value, 1.01 * value) for value in values]

    found = refine(world.problem, answers, sums_but_for_one, settings)
    assert found.best.items == unlike
    without = refine(world.problem, lambda count: first, sums_but_for_one, settings)
    assert without.stands and without.best.items == first[0]
    against = [trial for trial in without.trials if trial.source != "search"]
    assert len(against) == 12 and all(trial.predicted > without.best.true for trial in against)


def test_what_is_proposed_is_the_surrogates_own_prediction_and_may_be_better_where_any_may() -> None:
    world, batches = make_world(1, num_sites=9), []

    def measure(asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        batches.append(len(asked))
        return world.measure(asked)

    trials = refine(world.problem, answers_of(world.problem), measure, Settings(24)).trials
    scores = scores_by_site(singles(world.problem.items, world.problem.objective))
    at = np.array([sum(scores[name] for name in trial.items) for trial in trials])
    hopeful = 0
    for start, end in itertools.pairwise(itertools.accumulate(batches)):
        true = np.array([trial.true for trial in trials[:start]])
        surrogate = Surrogate.fitted(at[:start], true)
        means, errors = surrogate.predict(at[start:end])
        proposed = [place for place, trial in enumerate(trials[start:end]) if trial.source == "surrogate"]
        assert proposed or end - start < 4
        for place in proposed:
            assert trials[start + place].predicted == pytest.approx(means[place])
        may = [bool(means[place] * np.exp(-SURE * errors[place]) < true.min()) for place in proposed]
        assert all(may) or not any(may)
        hopeful += any(may)
    assert hopeful


def test_most_of_a_large_budget_is_for_what_the_model_proposes() -> None:
    assert [Settings(count).first for count in (6, 24, 60, 240)] == [6, 8, 12, 20]
    assert Settings(240, count=30).first == 30


@pytest.mark.parametrize("kill_after", [3, 10])
def test_what_was_stopped_repeats_no_evaluation_and_ends_the_same(kill_after: int) -> None:
    settings = Settings(24)
    whole, stopped = make_world(1, num_sites=9), make_world(1, num_sites=9)
    expected = refine(whole.problem, answers_of(whole.problem), whole.measure, settings)
    stopped.kill_after = kill_after
    with pytest.raises(Killed):
        refine(stopped.problem, answers_of(stopped.problem), stopped.measure, settings)
    stopped.kill_after = 1_000_000
    found = refine(stopped.problem, answers_of(stopped.problem), stopped.measure, settings)
    assert found == expected
    assert stopped.measured == whole.measured
    assert len(set(stopped.measured)) == len(stopped.measured)


def test_no_more_evaluations_than_count_is_the_best_of_the_k_best() -> None:
    world, settings = make_world(2), Settings(5, count=8)
    found = refine(world.problem, answers_of(world.problem), world.measure, settings)
    answers = answers_of(world.problem)(5)
    assert [trial.items for trial in found.trials] == answers
    assert len(answers) == 5
    assert found.best.true == pytest.approx(min(map(world.true, answers)))
    assert {trial.source for trial in found.trials} == {"search"}


def test_what_is_not_finite_is_never_the_best_and_all_of_it_is_an_error() -> None:
    world, settings = make_world(3), Settings(20)
    answers = answers_of(world.problem)
    first = answers(1)[0]

    def some_fail(asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        return [None if items == first else values for items, values in zip(asked, world.measure(asked), strict=True)]

    found = refine(world.problem, answers, some_fail, settings)
    assert found.best.items != first
    assert found.trials[0].true == float("inf")
    with pytest.raises(ConfigError, match="finite"):
        refine(world.problem, answers, lambda asked: [None] * len(asked), settings)
