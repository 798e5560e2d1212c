"""The search past additivity: evaluate truly, learn how changes act together, search what was learnt, again.

Reads a Problem, its best answers by sums of scores, and a function that evaluates architectures; computes what was
tried, best last. Begins with the best and different answers of the integer programme; then a model of interactions
(scoring/interactions.py) is fitted to all evaluations so far, its best architectures are found by local moves
(moves.py), and evaluated are those that it predicts to be best and those that may be, as far as it knows (the lowest of
prediction less a standard error). Where it knows of none that may be better, it is shown further answers of the integer
programme, and the search ends where these change nothing. All follows from evaluations and seed, so that what is
stopped goes on where it was.
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
BATCH = 4  # evaluated between two fits
STARTS = 4  # best evaluated architectures that moves begin at
POOL = 200  # neighbours of each optimum that are looked at
SURE = 1.0  # standard errors below its prediction, by which the unsure are ordered
HOPE = 2.0  # and by which an architecture may be better: where none may, the answer stands


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
        return min(self.evaluations, max(self.count, self.evaluations // FIRST_SHARE, LEAST_FIT))


@dataclass(frozen=True)
class Refined:
    """``stands``: nothing in reach may be better, as far as the model knows, and further answers of the search did not
    change that; else the budget was spent."""

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
    trials = _answered(problem, answers(settings.first), measure)
    if not any(trial.values for trial in trials):
        raise ConfigError("no architecture that the search found has finite outputs; score the library again")
    parts = singles(problem.items, problem.objective)
    shown = False
    while (left := settings.evaluations - len(trials)) > 0:
        count = min(left, BATCH)
        if asked := _proposals(problem, parts, trials, count, settings.seed):
            shown = False
            trials += _measured(asked, measure)
            continue
        tried = {trial.items for trial in trials}
        known = sum(trial.source == "search" for trial in trials)
        further = [] if shown else [one for one in answers(known + count) if one not in tried]
        if not further:
            return Refined(tuple(trials), stands=True)
        shown = True
        trials += _answered(problem, further, measure)
    return Refined(tuple(trials), stands=False)


def _answered(problem: Problem, answers: Sequence[Chosen], measure: Measure) -> list[Trial]:
    return _measured([(one, float(problem.objective_of(one)), "search") for one in answers], measure)


def _measured(asked: Sequence[tuple[Chosen, float, str]], measure: Measure) -> list[Trial]:
    values = measure([items for items, _, _ in asked])
    return [
        Trial(items, predicted, tuple(found or ()), source)
        for (items, predicted, source), found in zip(asked, values, strict=True)
    ]


def _proposals(
    problem: Problem, parts: tuple[Single, ...], trials: Sequence[Trial], count: int, seed: int
) -> list[tuple[Chosen, float, str]]:
    """Up to ``count`` new architectures: by turns the best predicted, and the lowest that may be."""
    model = _model(problem, parts, trials, seed)
    if model is None:
        return []
    pool = _pool(problem, model, trials)
    if not pool:
        return []
    means, errors = model.predict_many([_changes(problem, items) for items in pool])
    hopeful = means - HOPE * errors < min(trial.true for trial in trials)
    pool = [items for items, may in zip(pool, hopeful, strict=True) if may]
    means, errors = means[hopeful], errors[hopeful]
    found: list[tuple[Chosen, float, str]] = []
    orders = {"best": np.argsort(means, kind="stable"), "unsure": np.argsort(means - SURE * errors, kind="stable")}
    for turn in range(count):
        source = list(orders)[turn % 2]
        taken = [items for items, _, _ in found]
        place = next((int(one) for one in orders[source] if pool[one] not in taken), None)
        if place is not None:
            found.append((pool[place], float(means[place]), source))
    return found


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
