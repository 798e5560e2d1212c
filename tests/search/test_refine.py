"""Refine on a world whose interactions are known: what it finds, what it costs, and that a stop repeats nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from scipy.stats import spearmanr
from search_factories import all_choices, make_problem

from puzzle.scoring.design import Floats, scores_at, scores_by_site, singles
from puzzle.search import mip
from puzzle.search.problem import Chosen, Problem
from puzzle.search.refine import SURE, Settings, Trial, answers_of, refine
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


def answers_of_problem(problem: Problem) -> Callable[[int], list[Chosen]]:
    return lambda count: [one.items for one in mip.solve([problem], {}, count, 0.2).solutions]


@pytest.mark.parametrize("seed", range(3))
def test_the_interactions_are_learnt_and_the_optimum_found(seed: int) -> None:
    world, settings = make_world(seed), Settings(30)
    answers = answers_of_problem(world.problem)
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
        answers = answers_of_problem(world.problem)
        found = refine(world.problem, answers, world.measure, settings)
        of_answers = min(map(world.true, answers(settings.first)))
        gains.append(1 - found.best.true / of_answers)
    assert np.mean(gains) > 0.05


def test_where_the_surrogate_knows_of_nothing_better_it_is_shown_further_answers() -> None:
    world, settings = make_world(1, num_sites=9), Settings(24)
    answers = answers_of_problem(world.problem)
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


def batches_of(
    world: World, settings: Settings
) -> Iterator[tuple[Surrogate, Floats, Sequence[Trial], Sequence[Trial]]]:
    """By batch: the surrogate that it was asked by, the scores of its trials (N, sites), what came before, and it."""
    sizes: list[int] = []

    def measure(asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        sizes.append(len(asked))
        return world.measure(asked)

    trials = refine(world.problem, answers_of_problem(world.problem), measure, settings).trials
    scores = scores_by_site(singles(world.problem.items, world.problem.objective))
    at = scores_at(scores, [trial.items for trial in trials])
    for start, end in itertools.pairwise(itertools.accumulate(sizes)):
        surrogate = Surrogate.fitted(at[:start], np.array([trial.true for trial in trials[:start]]))
        yield surrogate, at[start:end], trials[:start], trials[start:end]


def test_what_is_proposed_may_be_better_even_if_those_before_it_come_out_as_predicted() -> None:
    hopeful = reordered = 0
    for seed in range(3):
        for surrogate, at, before, batch in batches_of(make_world(seed, num_sites=9), Settings(24)):
            proposed = [place for place, trial in enumerate(batch) if trial.source == "surrogate"]
            best, lowest = min(trial.true for trial in before), []
            for place in proposed:
                means, errors = surrogate.with_predicted(at[:place]).predict(at)
                assert batch[place].predicted == pytest.approx(means[place])
                lowest.append(means[place] * np.exp(-SURE * errors[place]))
                assert lowest[-1] <= min((means * np.exp(-SURE * errors))[proposed[len(lowest) - 1 :]]) * (1 + 1e-9)
            assert all(one < best for one in lowest) or not any(one < best for one in lowest)
            hopeful += any(one < best for one in lowest)
            means, errors = surrogate.predict(at[proposed])
            plain = means * np.exp(-SURE * errors)
            reordered += bool((np.diff(plain) < 0).any())
    assert hopeful and reordered


def test_predictions_rank_what_is_then_evaluated() -> None:
    ranks = []
    for seed in (0, 1, 3, 4):
        of_surrogate = [
            (trial.predicted, float(world_sum), trial.true)
            for _, at, _, batch in batches_of(make_world(seed, num_sites=12), Settings(40))
            for trial, world_sum in zip(batch, at.sum(1), strict=True)
            if trial.source == "surrogate"
        ]
        predicted, sums, true = (list(column) for column in zip(*of_surrogate, strict=True))
        ranks.append((spearmanr(predicted, true)[0], spearmanr(sums, true)[0]))
    by_surrogate, by_sums = np.mean(ranks, axis=0)
    assert by_surrogate > 0.5 and by_surrogate > by_sums + 0.3, ranks


def test_too_few_finite_ones_are_no_word_of_a_surrogate() -> None:
    world, settings = make_world(1, num_sites=9), Settings(20)
    first = answers_of_problem(world.problem)(1)[0]
    only = lambda asked: [(1.0, 1.1) if items == first else None for items in asked]
    found = refine(world.problem, answers_of_problem(world.problem), only, settings)
    assert not found.stands and len(found.trials) == 20 and {trial.source for trial in found.trials} == {"search"}


@pytest.mark.parametrize("count", [1, 3, 12])
def test_answers_are_the_searchs_own_then_further_ones_within_the_bounds(count: int) -> None:
    problem = make_world(1, num_sites=9).problem
    own = answers_of_problem(problem)(2)
    found = answers_of(problem, own, 0.2, 0.0, count)
    assert found[:2] == own[:count] and len(found) == len(set(found)) == count
    assert not any(problem.violations(one) for one in found)
    few = make_world(1, num_sites=2).problem
    alone = answers_of_problem(few)(1)
    assert len(answers_of(few, alone, 1.0, 0.0, 6)) > len(mip.solve([few], {}, 6, 1.0).solutions)


def test_most_of_a_large_budget_is_for_what_the_surrogate_proposes() -> None:
    assert [Settings(count).first for count in (6, 24, 60, 240)] == [6, 8, 12, 20]
    assert Settings(240, count=30).first == 30


@pytest.mark.parametrize("kill_after", [3, 10])
def test_what_was_stopped_repeats_no_evaluation_and_ends_the_same(kill_after: int) -> None:
    settings = Settings(24)
    whole, stopped = make_world(1, num_sites=9), make_world(1, num_sites=9)
    expected = refine(whole.problem, answers_of_problem(whole.problem), whole.measure, settings)
    stopped.kill_after = kill_after
    with pytest.raises(Killed):
        refine(stopped.problem, answers_of_problem(stopped.problem), stopped.measure, settings)
    stopped.kill_after = 1_000_000
    found = refine(stopped.problem, answers_of_problem(stopped.problem), stopped.measure, settings)
    assert found == expected
    assert stopped.measured == whole.measured
    assert len(set(stopped.measured)) == len(stopped.measured)


def test_no_more_evaluations_than_count_is_the_best_of_the_k_best() -> None:
    world, settings = make_world(2), Settings(5, count=8)
    found = refine(world.problem, answers_of_problem(world.problem), world.measure, settings)
    answers = answers_of_problem(world.problem)(5)
    assert [trial.items for trial in found.trials] == answers
    assert len(answers) == 5
    assert found.best.true == pytest.approx(min(map(world.true, answers)))
    assert {trial.source for trial in found.trials} == {"search"}


def test_what_is_not_finite_is_never_the_best_and_all_of_it_is_an_error() -> None:
    world, settings = make_world(3), Settings(20)
    answers = answers_of_problem(world.problem)
    first = answers(1)[0]

    def some_fail(asked: Sequence[Chosen]) -> list[Sequence[float] | None]:
        return [None if items == first else values for items, values in zip(asked, world.measure(asked), strict=True)]

    found = refine(world.problem, answers, some_fail, settings)
    assert found.best.items != first
    assert found.trials[0].true == float("inf")
    with pytest.raises(ConfigError, match="finite"):
        refine(world.problem, answers, lambda asked: [None] * len(asked), settings)
