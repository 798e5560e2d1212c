"""The commands that look at a search more closely: ``puzzle explain`` and ``puzzle compare``.

Pure, unless ``compare`` is asked for what needs a model (rivals.py, true evaluations). It leaves what it found for the
report.

Both solve on the run's tables, at the batch sizes at which the best architecture was found.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.cli_options import open_run, with_run
from puzzle.config import OBJECTIVES, score_of
from puzzle.types import ConfigError, Site, to_json

if TYPE_CHECKING:
    from puzzle.run import Run
    from puzzle.search.compare import Compared
    from puzzle.search.problem import Problem

CE = "ce_delta"


def add_commands(commands: Any) -> None:
    """Adds both to the command line's sub-commands."""
    explain = with_run(commands.add_parser("explain", help="why the best architecture is the best"))
    explain.add_argument("--step", type=float, default=1.0, metavar="PERCENT", help="moves each bound by (default 1)")
    explain.add_argument(
        "--site", action="append", default=[], metavar="L003.attention", help="price every variant of this site"
    )
    explain.set_defaults(command=lambda options: _explain(options, open_run(options)))
    compare = with_run(commands.add_parser("compare", help="the search beside simpler ways to choose"))
    compare.add_argument(
        "--importance", action="store_true", help="leave out the least important layers, by Block Importance"
    )
    compare.add_argument(
        "--importance-file", type=Path, metavar="FILE", help="the same, by a JSON list of one number a layer"
    )
    compare.add_argument(
        "--evolution", type=int, metavar="N", help="an evolutionary search with N true evaluations (EvoPress's way)"
    )
    compare.add_argument("--true", action="store_true", help="evaluate each architecture on the report split, too")
    compare.add_argument(
        "--quantised", action="store_true", help="the teacher in fp8 and int4-g32, which costs no search; with --true"
    )
    compare.set_defaults(command=lambda options: _compare(options, open_run(options)))


def _explain(options: argparse.Namespace, run: Run) -> None:
    from fractions import Fraction

    from puzzle.search import explain, mip

    if not 0 < options.step < 100:
        raise ConfigError(f"--step: expected percent between 0 and 100, found {options.step:g}")
    problem, choice = mip.best_of(_problems(run))
    sites = [_site(name, problem) for name in options.site]
    if problem.label:
        print(problem.label)
    print(explain.text(explain.explain(problem, choice.chosen, Fraction(str(options.step)) / 100), problem))
    for site in sites:
        print(f"\n{site}, if it had to be:")
        print(explain.alternatives_text(explain.alternatives(problem, choice.chosen, site), problem))


def _site(name: str, problem: Problem) -> Site:
    for site in problem.sites:
        if str(site) == name:
            return site
    raise ConfigError(f"--site: the model has no {name!r}; its sites are {problem.sites[0]} to {problem.sites[-1]}")


def _compare(options: argparse.Namespace, run: Run) -> None:
    from puzzle import artifacts, pipeline, plans
    from puzzle.rivals import evolutions, quantised_teachers
    from puzzle.search import mip
    from puzzle.search.compare import compare, table
    from puzzle.search.constraints import usable_items

    problem, _ = mip.best_of(_problems(run))
    scores = run.read_scores()
    has_ce = any(metric == CE for _, metric in scores.scores)
    loss = {item.id: score for item, score in usable_items(problem.items, scores, CE).items()} if has_ce else None
    if options.evolution is not None and options.evolution < 1:
        raise ConfigError(f"--evolution: expected at least 1 true evaluation, found {options.evolution}")
    importance = _importance(run, options)
    more = {} if options.evolution is None else evolutions(run, problem, options.evolution)
    metric = score_of(problem.objective_name)
    true = options.true or options.quantised
    measure = partial(pipeline.true_values, run, split="report", metric=metric) if true else None
    rounded = quantised_teachers(run, problem) if options.quantised else []
    found = compare(problem, loss, importance, run.config.seed, measure, more)
    found = (*(found if true else (_known(run, one, metric) for one in found)), *rounded)
    told = {"objective": problem.objective_name, "found": [to_json(one) for one in found]}
    artifacts.publish_json(run.comparison, plans.search_inputs(run), told)
    if problem.label:
        print(problem.label)
    print(table(found, problem))


def _known(run: Run, found: Compared, metric: str) -> Compared:
    """With its true value, where an evaluation of before holds for it still."""
    from puzzle import pipeline, plans
    from puzzle.tables import read_truth

    if not found.chosen or run.context:
        return found
    unit = plans.truth_of(run, found.chosen, "report")
    if pipeline.unit_state(unit) != "done":
        return found
    score = read_truth(unit.path).get(metric)
    return replace(found, measured=() if score is None else score.per_sequence)


def _importance(run: Run, options: argparse.Namespace) -> list[float] | None:
    """One number a layer: a file's, or Block Importance; None where neither is asked for."""
    from puzzle.rivals import block_importance

    if options.importance_file is None:
        return block_importance(run) if options.importance else None
    path: Path = options.importance_file
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
        raise ConfigError(f"{path}: expected a list of numbers, one a layer, e.g. [0.31, 0.05]")
    return [float(number) for number in numbers]


def _problems(run: Run) -> tuple[Problem, ...]:
    if run.constraint_file.objective not in {*OBJECTIVES, *run.config.score.tasks}:
        raise ConfigError(
            f"{run.constraints}: explain and compare are about quality within limits, and the objective is "
            f"{run.constraint_file.objective}; `puzzle search` minimises that"
        )
    return run.problems()
