"""The search past additivity: evaluate truly, learn how changes act together, search what was learnt, again.

Reads a Problem, its best answers by sums of scores, and a function that evaluates architectures; computes what was
tried, best last. Begins with the best and different answers of the integer programme; then a surrogate (surrogate.py)
is fitted to all evaluations so far, its best architectures are found by local moves (moves.py), and evaluated are those
that may be the lowest, as far as it knows (logarithms less some standard errors: lower confidence bounds, as of
Srinivas et al., arXiv 0912.3995), each as if those before it had come out as predicted (their batches: Desautels et
al., arXiv 1206.6402). Where none may be better than the best, the surrogate's word is tested: on the lowest all the
same, and on further answers of the integer programme; the search ends where it has been right several times in a row.
All follows from the evaluations, so that what is stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.scoring.design import Floats, scores_at, scores_by_site, singles
from puzzle.search import mip
from puzzle.search.moves import Moves
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.search.programme import Effort
from puzzle.search.surrogate import Surrogate
from puzzle.types import ConfigError

LEAST_FIT = 8  # evaluations that the surrogate is fitted to
FIRST_SHARE = 5  # of the evaluations, one in so many goes to answers of the integer programme
MOST_FIRST = 20  # but no more than so many: they are alike
NEARLY = 1e-3  # their relative gap: a dozen at 80 layers x 54 blocks are there in seconds, proven ones in hours
BATCH = 4  # evaluated between two fits
STARTS = 8  # best evaluated architectures that moves begin at
POOL = 1000  # neighbours of each optimum that are looked at
SURE = 3.0  # standard errors by which an architecture may be better than predicted: where none may, the answer stands
PATIENCE = 3  # batches in a row that put that to the test

Proposal = tuple[Chosen, float, str]  # what is to be evaluated, what is predicted of it, and where it comes from


@dataclass(frozen=True)
class Trial:
    """One architecture: ``values`` per sequence (none: not finite); ``predicted`` before it was evaluated."""

    items: Chosen
    predicted: float
    values: tuple[float, ...]
    source: str  # "search": an answer of the integer programme; "surrogate": what may be the lowest by it

    @property
    def true(self) -> float:
        return statistics.fmean(self.values) if self.values else math.inf


@dataclass(frozen=True)
class Settings:
    """``evaluations``: the budget; the first ``count`` answers are among them in any case.

    ``seed``: of what is random in a study (study.py); here nothing is.
    """

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
    """``stands``: nothing in reach may be better, as far as the surrogate knows, and what was evaluated to test that
    was not; else the budget was spent."""

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

    ``settings.first`` are evaluated in any case, others where the surrogate knows of nothing better.
    """
    trials = _measured(_of_search(problem, answers(settings.first)), measure)
    if not any(trial.values for trial in trials):
        raise ConfigError("no architecture that the search found has finite outputs; score the library again")
    scores = scores_by_site(singles(problem.items, problem.objective))
    tests = 0
    while tests < PATIENCE and (left := settings.evaluations - len(trials)) > 0:
        count, best = min(left, BATCH), min(trial.true for trial in trials)
        moves = _learnt(problem, scores, trials)
        hopeful, asked = (False, []) if moves is None else _proposals(moves, trials, count)
        if not hopeful:
            known = sum(trial.source == "search" for trial in trials) + count
            tried = {trial.items for trial in trials} | {items for items, _, _ in asked}
            further = [one for one in answers(known) if one not in tried][: count - min(count // 2, len(asked))]
            asked = [*asked[: count - len(further)], *_of_search(problem, further)]
        if not asked:
            return Refined(tuple(trials), stands=moves is not None)
        trials += _measured(asked, measure)
        if hopeful or min(trial.true for trial in trials) < best:
            tests = 0
        elif moves is not None:
            tests += 1
    return Refined(tuple(trials), stands=tests == PATIENCE)


def answers_of(problem: Problem, own: Sequence[Chosen], min_difference: float, gap: float, count: int) -> list[Chosen]:
    """What the search found itself, ``own``, the best first, then further best ones that differ as asked; where there
    are not so many, those that differ at all. No time limits them, so that what was stopped comes upon the same."""
    found = dict.fromkeys(own)
    for difference in (min_difference, 0.0):
        if len(found) < count:
            effort = Effort(max(gap, NEARLY))
            solutions = mip.solve([problem], {}, count, difference, effort, own[0]).solutions
            found |= dict.fromkeys(one.items for one in solutions)
    return list(found)[:count]


def _of_search(problem: Problem, answers: Sequence[Chosen]) -> list[Proposal]:
    return [(one, float(problem.objective_of(one)), "search") for one in answers]


def _measured(asked: Sequence[Proposal], measure: Measure) -> list[Trial]:
    values = measure([items for items, _, _ in asked])
    return [
        Trial(items, predicted, tuple(found or ()), source)
        for (items, predicted, source), found in zip(asked, values, strict=True)
    ]


def _learnt(problem: Problem, scores: Mapping[str, Floats], trials: Sequence[Trial]) -> Moves | None:
    """Moves valued by what the trials say; None where that is too little."""
    known = [trial for trial in trials if 0 < trial.true < math.inf]
    if len(known) < LEAST_FIT:
        return None
    at = scores_at(scores, [trial.items for trial in known])
    return Moves(problem, scores, Surrogate.fitted(at, np.array([trial.true for trial in known])))


def _proposals(moves: Moves, trials: Sequence[Trial], count: int) -> tuple[bool, list[Proposal]]:
    """Whether any may be better than the best, and up to ``count`` new architectures, if so of those, the lowest that
    may be first."""
    best = min(trial.true for trial in trials)
    pool = _pool(moves, trials)
    at = scores_at(moves.scores, pool)
    found: list[int] = []
    hopeful = False
    while len(found) < min(count, len(pool)):
        means, errors = moves.surrogate.with_predicted(at[found]).predict(at)
        lowest = means * np.exp(-SURE * errors)
        lowest[found] = np.inf
        place = int(lowest.argmin())
        may = bool(lowest[place] < best)
        if hopeful and not may:
            break
        hopeful = may
        found.append(place)
    return hopeful, [(pool[place], float(means[place]), "surrogate") for place in found]


def _pool(moves: Moves, trials: Sequence[Trial]) -> list[Chosen]:
    """What moves reach from the best trials, and the neighbours of that, but for what was tried."""
    tried = {trial.items for trial in trials}
    starts = sorted(trials, key=lambda trial: trial.true)[:STARTS]
    ends = dict.fromkeys(moves.descend(trial.items) for trial in starts)
    found: dict[Chosen, None] = {}
    for end in ends:
        found |= dict.fromkeys([end, *(other for _, other in moves.neighbours(end, POOL))])
    return [items for items in found if items not in tried]
