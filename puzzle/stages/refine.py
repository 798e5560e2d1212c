"""The stage that looks past sums of scores: contenders are evaluated truly, and what that teaches is searched again.

Reads tables, library and the splits ``select``, which chooses, and ``report``, which is only told of; writes a solution
that later stages go on with, and the true evaluations (stages/truth.py), which a start after a stop does not repeat.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from puzzle import pipeline
from puzzle.config import score_of
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.ranks import Ranks
from puzzle.run import Run
from puzzle.search.problem import Measure, Problem, solved
from puzzle.search.refine import Refined, Settings, Trial, answers_of, refine
from puzzle.search.study import study
from puzzle.stages.truth import Truths, jobs
from puzzle.types import ConfigError, Solution, mean_and_error


def make_refine(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """At the batch sizes that the search chose. Rank 0 decides what is evaluated; ranks share it."""
    (unit,) = missing
    settings = Settings(run.config.refine.evaluations, run.constraint_file.solutions.count, run.config.refine.seed)
    with contextlib.ExitStack() as stack:
        truths = Truths(run, jobs(run, stack), progress, max(settings.evaluations, 3))
        if not Ranks.current().first:
            truths.serve()
            return
        searched, *others = run.unrefined.solutions()
        problem = _problem(run, searched)
        own = [one.items for one in (searched, *others) if not problem.violations(one.items)]
        solutions, solver = run.constraint_file.solutions, run.constraint_file.solver
        metric = score_of(problem.objective_name)
        progress.total(settings.evaluations, 0)
        answers = functools.partial(answers_of, problem, own, solutions.min_difference, solver.gap)
        select = truths.of("select", metric)
        if metric == "kl":
            found = refine(problem, answers, select, settings)
        else:
            # one for each solution: what other scores or another library led to is no guide here
            journal = run.folder / "truth" / f"{unit.path.name}.journal"
            found = study(problem, answers(settings.first), select, settings, journal)
        rows = _comparison(problem, found, truths.of("report", metric))
        truths.end()
    best = _solution(run, searched, problem, found.best, unit.inputs)
    more = {"comparison": rows, "num_trials": len(found.trials), "stands": found.stands}
    pipeline.publish_solutions(run, unit, [best], **more)
    progress.done(unit.path.name)


def _problem(run: Run, searched: Solution) -> Problem:
    """The search that found ``searched``; ConfigError where it minimised a cost, not quality."""
    if searched.minimised is not None:
        raise ConfigError(
            f"{run.constraints}: refine is about quality within limits, and the objective is {searched.minimised}; "
            "bound that, and let the objective be a score"
        )
    return solved(run.problems(), searched)


def _comparison(problem: Problem, found: Refined, report: Measure) -> list[dict[str, Any]]:
    """The search's answer, the best by truth of its and further ones, and the best of all: on select and report."""
    answers = [trial for trial in found.trials if trial.source == "search"]
    best = min(answers, key=lambda trial: trial.true)
    shown = {"search": found.trials[0], f"best of its {len(answers)} best": best, "refined": found.best}
    values = dict(zip(shown, report([trial.items for trial in shown.values()]), strict=True))
    return [
        {
            "name": name,
            "items": list(trial.items),
            "sum": float(problem.objective_of(trial.items)),
            "predicted": trial.predicted,
            "select": _mean_and_error(trial.values),
            "report": _mean_and_error(values[name] or ()),
            "excess": _mean_and_error(_differences(values[name], values["search"])),
        }
        for name, trial in shown.items()
    ]


def _differences(values: Sequence[float] | None, others: Sequence[float] | None) -> list[float]:
    return [one - other for one, other in zip(values or (), others or (), strict=False)]


def _mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """None for what is not finite, and for the error of a single sequence."""
    if not values:
        return None, None
    mean, error = mean_and_error(values)
    return mean, error if math.isfinite(error) else None


def _solution(run: Run, searched: Solution, problem: Problem, best: Trial, inputs: Mapping[str, str]) -> Solution:
    """What the search's own was, but for what is chosen: no sum of scores is below its bound."""
    metric = score_of(problem.objective_name)
    return replace(
        searched,
        items=best.items,
        objective_nats=float(problem.objective_of(best.items)),
        status="optimal" if best.items == searched.items else "feasible",
        gap=searched.gap if best.items == searched.items else None,  # it is of sums of scores
        totals=problem.totals(best.items),
        inputs=dict(inputs),
        objective_se=run.read_scores().standard_error(best.items, metric),
        found_by="refine",
    )
