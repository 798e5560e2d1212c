"""The search where no sum of scores says what an architecture is worth: an Optuna study near the MIP's answers.

Reads a Problem, its best answers and a function that evaluates architectures; computes what was tried; writes Optuna's
journal. Each site is a choice among what the answers have there and the next better and next worse by score, so that
the answers are the first trials and TPE goes on from them. Bounds, conflicts and sites covered twice are constraints in
Optuna's own sense: what breaks one is never evaluated and only tells where not to look. All follows from answers,
evaluations and seed: a study that was stopped goes on where it was, and ends as it would have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from puzzle import artifacts
from puzzle.search.problem import Chosen, Measure, Problem
from puzzle.search.refine import Refined, Settings, Trial
from puzzle.types import Site

MOST_TRIALS = 40  # an evaluation: most trials of a tight problem break a bound, which costs nothing
Options = Mapping[str, tuple[str, ...]]  # by site, the items to choose from that begin there


def study(problem: Problem, answers: Sequence[Chosen], measure: Measure, settings: Settings, journal: Path) -> Refined:
    """The answers first, then what TPE suggests.

    ``measure`` is asked again for what a stopped study had evaluated: it should remember. It ends before its
    evaluations are spent where so many trials have found nothing new that keeps all bounds.
    """
    import optuna  # takes a second, which a search by sums need not wait for
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    options, states = _options(problem, answers), optuna.trial.TrialState
    bounds = [(row.quantity.name, *map(str, row.linear_bounds())) for row in problem.rows]
    running = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
        study_name=artifacts.fingerprint([options, answers, bounds, problem.objective_name, settings.seed]),
        load_if_exists=True,
    )
    for stopped in running.get_trials(deepcopy=False, states=(states.RUNNING,)):  # under way at the time
        running.tell(stopped.number, state=states.FAIL)
    done = [trial.params for trial in running.get_trials(deepcopy=False, states=(states.COMPLETE,))]
    tried = [one for one in dict.fromkeys(_chosen(problem, picks) for picks in done) if not problem.violations(one)]
    known = dict(zip(tried, measure(tried), strict=True)) if tried else {}
    for number in range(len(done), MOST_TRIALS * settings.evaluations):
        if len(known) >= settings.evaluations:
            break
        # a generator of its own for each trial: where the study was stopped makes no difference
        seed = int(np.random.default_rng([settings.seed, number]).integers(2**31))
        running.sampler = optuna.samplers.TPESampler(seed=seed)
        if number < len(answers) and not running.get_trials(deepcopy=False, states=(states.WAITING,)):
            running.enqueue_trial({str(min(problem.by_id[one].sites)): one for one in answers[number]})
        trial = running.ask()
        chosen = _chosen(problem, {site: trial.suggest_categorical(site, of) for site, of in options.items()})
        for name, excess in _excess(problem, chosen).items():
            trial.set_constraint(name, excess)
        if problem.violations(chosen):
            running.tell(trial, float(problem.objective_of(chosen)))
            continue
        if chosen not in known:
            known |= zip([chosen], measure([chosen]), strict=True)
        running.tell(trial, _mean(known[chosen]))
    first = set(answers)
    trials = tuple(
        Trial(one, float(problem.objective_of(one)), tuple(values or ()), "search" if one in first else "study")
        for one, values in known.items()
    )
    return Refined(trials, stands=len(known) < settings.evaluations)


def _mean(values: Sequence[float] | None) -> float:
    return statistics.fmean(values) if values else math.inf


def _options(problem: Problem, answers: Sequence[Chosen]) -> Options:
    """By the site they begin at: of items that cover the same sites, the answers' and their neighbours by score.

    Where no answer has a single item at a site, because a wider one covers it, the best one is on offer.
    """
    used = {item_id for one in answers for item_id in one}
    groups: dict[tuple[Site, ...], list[str]] = {}
    for item in sorted(problem.items, key=lambda item: (problem.objective[item.id], item.id)):
        groups.setdefault(tuple(sorted(item.sites)), []).append(item.id)
    options: dict[str, tuple[str, ...]] = {}
    for sites in sorted(groups):
        ranks = [rank for rank, item_id in enumerate(groups[sites]) if item_id in used]
        near = sorted({rank + step for rank in ranks or [0] for step in (-1, 0, 1)} & set(range(len(groups[sites]))))
        if ranks or len(sites) == 1:
            options[str(sites[0])] = (*options.get(str(sites[0]), ()), *(groups[sites][rank] for rank in near))
    return options


def _chosen(problem: Problem, picks: Mapping[str, str]) -> Chosen:
    """Site by site; what an earlier item covers is not asked."""
    chosen, covered = [], set[Site]()
    for site in problem.sites:
        if site not in covered and str(site) in picks:
            chosen.append(picks[str(site)])
            covered.update(problem.by_id[picks[str(site)]].sites)
    return tuple(chosen)


def _excess(problem: Problem, chosen: Chosen) -> dict[str, float]:
    """By name, how far each constraint is exceeded, relative to its bound: above 0, exactly where it is broken."""
    sites = [site for item_id in chosen for site in problem.by_id[item_id].sites]
    broken = sum(set(conflict.item_ids) <= set(chosen) for conflict in problem.conflicts)
    found = {"sites": float(len(sites) - 2 * len(set(sites)) + len(problem.sites)), "conflicts": float(broken)}
    for row in problem.rows:
        lower, upper = row.linear_bounds()
        total = row.quantity.linear(chosen)
        over = [total - upper] if upper is not None else []
        over += [lower - total] if lower is not None else []
        scale = max((abs(bound) for bound in (lower, upper) if bound), default=Fraction(1))
        found[row.written] = float(max(over, default=Fraction(0)) / scale)
    return found
