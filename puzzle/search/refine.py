"""The search past additivity: evaluate truly, learn how changes act together, search what was learnt, again.

Reads a Problem, its best answers by sums of scores, and a function that evaluates architectures; computes what was
tried, best last. Begins with the best and different answers of the integer programme; then a model of interactions
(scoring/interactions.py) is fitted to all evaluations so far, its best architectures are found by local moves
(moves.py), and evaluated are those that it predicts to be best and those that may be, as far as it knows (the lowest of
prediction less a standard error). Where it knows of none that may be better, its word is tested: on those that it
predicts to be best all the same, and on further answers of the integer programme; the search ends where it has been
right several times in a row. All follows from evaluations and seed, so that what is stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.scoring.design import Single, singles
from puzzle.scoring.interactions import Evaluation, InteractionModel, cross_validated
from puzzle.search.moves import Moves
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.types import ConfigError, mean_and_error
from puzzle.variants import is_teacher

KIND = "interactions"  # no curve of the sum: fitted to the search's answers, which are alike, it misleads beyond them
LEAST_FIT = 8  # evaluations that a model is fitted to
FIRST_SHARE = 3  # of the evaluations, one in so many goes to answers of the integer programme
MOST_FIRST = 20  # but no more than so many: they are alike, and a model of too many is too sure
BATCH = 4  # evaluated between two fits
STARTS = 4  # best evaluated architectures that moves begin at
POOL = 200  # neighbours of each optimum that are looked at
SURE = 1.0  # standard errors below its prediction, by which the unsure are ordered
HOPE = 2.0  # and by which an architecture may be better: where none may, the answer stands
PATIENCE = 3  # batches in a row that put that to the test


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
    """``stands``: nothing in reach may be better, as far as the model knows, and what was evaluated to test that was
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

    ``settings.first`` are evaluated in any case, others where the model knows of nothing better.
    """
    trials = _measured(_of_search(problem, answers(settings.first)), measure)
    if not any(trial.values for trial in trials):
        raise ConfigError("no architecture that the search found has finite outputs; score the library again")
    parts = singles(problem.items, problem.objective)
    tests = 0
    while tests < PATIENCE and (left := settings.evaluations - len(trials)) > 0:
        count, best = min(left, BATCH), min(trial.true for trial in trials)
        hopeful, asked = _proposals(problem, parts, trials, count, settings.seed)
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


def _of_search(problem: Problem, answers: Sequence[Chosen]) -> list[tuple[Chosen, float, str]]:
    return [(one, float(problem.objective_of(one)), "search") for one in answers]


def _measured(asked: Sequence[tuple[Chosen, float, str]], measure: Measure) -> list[Trial]:
    values = measure([items for items, _, _ in asked])
    return [
        Trial(items, predicted, tuple(found or ()), source)
        for (items, predicted, source), found in zip(asked, values, strict=True)
    ]


def _proposals(
    problem: Problem, parts: tuple[Single, ...], trials: Sequence[Trial], count: int, seed: int
) -> tuple[bool, list[tuple[Chosen, float, str]]]:
    """Whether any may be better than the best, and up to ``count`` new architectures, if so of those: by turns the best
    predicted, and the lowest that may be."""
    model = _model(problem, parts, trials, seed)
    pool = [] if model is None else _pool(problem, model, trials)
    if model is None or not pool:
        return False, []
    means, errors = model.predict_many([_changes(problem, items) for items in pool])
    may = means - HOPE * errors < min(trial.true for trial in trials)
    hopeful = bool(may.any())
    if hopeful:
        pool = [items for items, one in zip(pool, may, strict=True) if one]
        means, errors = means[may], errors[may]
    found: list[tuple[Chosen, float, str]] = []
    orders = {"best": np.argsort(means, kind="stable"), "unsure": np.argsort(means - SURE * errors, kind="stable")}
    for turn in range(count):
        source = list(orders)[turn % 2]
        taken = [items for items, _, _ in found]
        place = next((int(one) for one in orders[source] if pool[one] not in taken), None)
        if place is not None:
            found.append((pool[place], float(means[place]), source))
    return hopeful, found


def _model(problem: Problem, parts: tuple[Single, ...], trials: Sequence[Trial], seed: int) -> InteractionModel | None:
    known = []
    for trial in trials:
        changed = _changes(problem, trial.items)
        if len(changed) > 1 and 0 < trial.true < math.inf:
            error = mean_and_error(trial.values)[1] if len(trial.values) > 1 else 0.0
            known.append(Evaluation(changed, trial.true, error))
    if len(known) < LEAST_FIT:
        return None
    return cross_validated(KIND, known, parts, folds=min(10, len(known)), seed=seed).model


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
