"""The search past additivity: evaluate truly, learn how changes act together, search what was learnt, again.

Reads a Problem, its best answers by sums of scores, and a function that evaluates architectures; computes what was
tried, best last. Begins with the best and different answers of the integer programme; then models of interactions
(scoring/interactions.py) are fitted to all evaluations so far, their best architectures are found by local moves
(moves.py), and evaluated are, of each model by turns, those that it predicts to be best and those that may be, as far
as it knows (the lowest of prediction less a standard error). Where no model knows of any that may be better, their word
is tested: on those that they predict to be best all the same, and on further answers of the integer programme; the
search ends where they have been right several times in a row. All follows from evaluations and seed, so that what is
stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.scoring.design import Single, singles
from puzzle.scoring.interactions import Evaluation, InteractionModel, cross_validated
from puzzle.search.moves import Moves
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.types import ConfigError, mean_and_error
from puzzle.variants import is_teacher

# without a power of the sum, which misleads where answers are alike, and with it, as large changes call for
KINDS = ("interactions", "interactions-of-power")
LEAST_FIT = 8  # evaluations that a model is fitted to
FIRST_SHARE = 5  # of the evaluations, one in so many goes to answers of the integer programme
MOST_FIRST = 20  # but no more than so many: they are alike, and a model of too many is too sure
BATCH = 4  # evaluated between two fits
STARTS = 4  # best evaluated architectures that moves begin at
POOL = 200  # neighbours of each optimum that are looked at
SURE = 1.0  # standard errors below its prediction, by which the unsure are ordered
HOPE = 2.0  # and by which an architecture may be better: where none may, the answer stands
PATIENCE = 3  # batches in a row that put that to the test

Proposal = tuple[Chosen, float, str]  # what is to be evaluated, what is predicted of it, and where it comes from


@dataclass(frozen=True)
class Trial:
    """One architecture: ``values`` per sequence (none: not finite); ``predicted`` before it was evaluated."""

    items: Chosen
    predicted: float
    values: tuple[float, ...]
    source: str  # "search": an answer of the integer programme; "best", "unsure": by the model

    @property
    def true(self) -> float:
        return statistics.fmean(self.values) if self.values else math.inf


@dataclass(frozen=True)
class Settings:
    """``evaluations``: the budget; the first ``count`` answers of the search are among them in any case."""

    evaluations: int
    count: int = 1
    seed: int = 0

    @property
    def first(self) -> int:
        """How many answers of the search are evaluated before anything is learnt."""
        share = min(self.evaluations // FIRST_SHARE, MOST_FIRST)
        return min(self.evaluations, max(self.count, share, LEAST_FIT))


@dataclass(frozen=True)
class Refined:
    """``stands``: nothing in reach may be better, as far as the models know, and what was evaluated to test that was
    not; else the budget was spent."""

    trials: tuple[Trial, ...]
    stands: bool

    @property
    def best(self) -> Trial:
        """The best by truth; of equals the first."""
        return min(self.trials, key=lambda trial: trial.true)


def refine(
    problem: Problem, answers: Callable[[int], Sequence[Chosen]], measure: Measure, settings: Settings
) -> Refined:
    """``answers``: so many, or what there are, of the search's best and different ones, the best first.

    ``settings.first`` are evaluated in any case, others where the models know of nothing better.
    """
    trials = _measured(_of_search(problem, answers(settings.first)), measure)
    if not any(trial.values for trial in trials):
        raise ConfigError("no architecture that the search found has finite outputs; score the library again")
    parts = singles(problem.items, problem.objective)
    tests = 0
    while tests < PATIENCE and (left := settings.evaluations - len(trials)) > 0:
        count, best = min(left, BATCH), min(trial.true for trial in trials)
        hopeful, asked = _proposals(problem, _models(problem, parts, trials, settings.seed), trials, count)
        if not hopeful:
            known = sum(trial.source == "search" for trial in trials) + count
            tried = {trial.items for trial in trials} | {items for items, _, _ in asked}
            further = [one for one in answers(known) if one not in tried][: count - count // 2]
            asked = [*asked[: count - len(further)], *_of_search(problem, further)]
        if not asked:
            return Refined(tuple(trials), stands=True)
        trials += _measured(asked, measure)
        tests = 0 if hopeful or min(trial.true for trial in trials) < best else tests + 1
    return Refined(tuple(trials), stands=tests == PATIENCE)


def _of_search(problem: Problem, answers: Sequence[Chosen]) -> list[Proposal]:
    return [(one, float(problem.objective_of(one)), "search") for one in answers]


def _measured(asked: Sequence[Proposal], measure: Measure) -> list[Trial]:
    values = measure([items for items, _, _ in asked])
    return [
        Trial(items, predicted, tuple(found or ()), source)
        for (items, predicted, source), found in zip(asked, values, strict=True)
    ]


def _proposals(
    problem: Problem, models: Iterable[InteractionModel], trials: Sequence[Trial], count: int
) -> tuple[bool, list[Proposal]]:
    """Whether any may be better than the best, and up to ``count`` new architectures, if so of those: of the models by
    turns the best predicted, then the lowest that may be."""
    ranked = [_ranked(problem, model, trials) for model in models]
    hopeful = any(hope for hope, _ in ranked)
    orders = [of_model for hope, of_model in ranked if of_model and hope == hopeful]
    found: dict[Chosen, Proposal] = {}
    for order in itertools.islice(itertools.cycle(itertools.chain(*zip(*orders, strict=True))), count):
        new = next((one for one in order if one[0] not in found), None)
        if new is not None:
            found[new[0]] = new
    return hopeful, list(found.values())


def _ranked(
    problem: Problem, model: InteractionModel, trials: Sequence[Trial]
) -> tuple[bool, tuple[list[Proposal], ...]]:
    """Whether the model knows of any that may be better than the best; all that it knows of, if so of those, in two
    orders: by what it predicts, and by how low that may be."""
    if not (pool := _pool(problem, model, trials)):
        return False, ()
    means, errors = model.predict_many([_changes(problem, items) for items in pool])
    may = means - HOPE * errors < min(trial.true for trial in trials)
    hopeful = bool(may.any())
    places = [int(place) for place in np.flatnonzero(may == hopeful)]
    orders = {"best": means, "unsure": means - SURE * errors}
    return hopeful, tuple(
        [(pool[place], float(means[place]), source) for place in sorted(places, key=values.__getitem__)]
        for source, values in orders.items()
    )


def _models(
    problem: Problem, parts: tuple[Single, ...], trials: Sequence[Trial], seed: int
) -> Iterator[InteractionModel]:
    """One of each kind; none where too little is known."""
    known = []
    for trial in trials:
        changed = _changes(problem, trial.items)
        if len(changed) > 1 and 0 < trial.true < math.inf:
            error = mean_and_error(trial.values)[1] if len(trial.values) > 1 else 0.0
            known.append(Evaluation(changed, trial.true, error))
    if len(known) >= LEAST_FIT:
        for kind in KINDS:
            yield cross_validated(kind, known, parts, folds=min(10, len(known)), seed=seed).model


def _pool(problem: Problem, model: InteractionModel, trials: Sequence[Trial]) -> list[Chosen]:
    """What moves reach from the best trials, and the neighbours of that, but for what was tried."""
    tried = {trial.items for trial in trials}
    moves = Moves(problem, model)
    starts = sorted(trials, key=lambda trial: trial.true)[:STARTS]
    ends = dict.fromkeys(moves.descend(trial.items) for trial in starts)
    found: dict[Chosen, None] = {}
    for end in ends:
        found |= dict.fromkeys([end, *(other for _, other in moves.neighbours(end, POOL))])
    return [items for items in found if items not in tried]


def _changes(problem: Problem, items: Iterable[str]) -> Chosen:
    """Without the teacher's own blocks."""
    return tuple(name for name in items if not is_teacher(problem.by_id[name]))
