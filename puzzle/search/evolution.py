"""An evolutionary search by true evaluations, after EvoPress (arXiv 2410.14649): what the scores have to be worth.

Reads a Problem; each generation mutates the best architecture so far, by level switches that keep the budget, and
selects among the offspring in steps: many on few tokens, the survivors on more. Writes nothing; what needs a model, the
true quality of an architecture, is handed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puzzle.search.baselines import Walk, best_uniform
from puzzle.search.problem import Problem
from puzzle.types import ConfigError

OFFSPRING = 16  # of a generation
MOST_SWITCHES = 3
STALE_GENERATIONS = 100  # without an offspring that was not evaluated before: the neighbourhood is exhausted


@dataclass(frozen=True)
class Step:
    """One step of the selection: ``survivors`` go on. ``share``: what one evaluation costs of a true one."""

    evaluate: Callable[[tuple[str, ...]], float]
    share: float
    survivors: int


def evolve(
    problem: Problem, steps: Sequence[Step], evaluations: float, seed: int = 0, start: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The best architecture found with so many true ``evaluations``, in the order of the sites.

    ``steps``: from few tokens to all, the last of ``share`` 1. ``start``: where it begins, e.g. the search's answer;
    by default at the best uniform one. An offspring takes its parent's place only if the last step finds it better, so
    what is returned is never worse than the start. ConfigError where the start has items over several sites, which a
    mutation cannot switch; InfeasibleError where no uniform one fits.
    """
    assert steps and steps[-1].share == 1
    walk = Walk.over(problem, random.Random(seed))
    parent = walk.picks_of(best_uniform(problem) if start is None else start)
    if parent is None:
        raise ConfigError("evolution switches variants of single sites; this start has items over several sites")
    known: list[dict[tuple[int, ...], float]] = [{} for _ in steps]
    left, stale = evaluations, 0
    if left >= 1:
        left -= _evaluate(walk, steps[-1], known[-1], [parent])
    while (count := _affordable(steps, left)) and stale < STALE_GENERATIONS:
        born = sorted({_mutated(walk, parent) for _ in range(count)})
        alive = [child for child in born if child not in known[-1] and not problem.violations(walk.ids(child))]
        stale = 0 if alive else stale + 1
        for step, values in zip(steps, known, strict=True):
            left -= _evaluate(walk, step, values, alive)
            alive = sorted(alive, key=values.__getitem__)[: step.survivors]
        parent = min([parent, *alive], key=known[-1].__getitem__)
    return walk.ids(parent)


def _affordable(steps: Sequence[Step], left: float) -> int:
    """How many offspring can go through all steps of a generation; 0 where the evaluations left do not pay for one."""
    for count in range(OFFSPRING, 0, -1):
        going_on, cost = count, 0.0
        for step in steps:
            cost += going_on * step.share
            going_on = min(going_on, step.survivors)
        if cost <= left:
            return count
    return 0


def _evaluate(walk: Walk, step: Step, values: dict[tuple[int, ...], float], wanted: Sequence[tuple[int, ...]]) -> float:
    """Adds the values that are not known yet; what that cost, in true evaluations. What is no number is worst."""
    new = [picks for picks in wanted if picks not in values]
    for picks in new:
        value = step.evaluate(walk.ids(picks))
        values[picks] = math.inf if math.isnan(value) else value
    return step.share * len(new)


def _mutated(walk: Walk, parent: tuple[int, ...]) -> tuple[int, ...]:
    """A few switches, rarely many: one site goes down to a cheaper variant, another up; then what is broken is mended
    and what is left of the budget used.
    """
    picks, rng = list(parent), walk.rng
    for _ in range(min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))):
        for cheaper in (True, False):
            moves = [_moves(levels, pick, cheaper) for levels, pick in zip(walk.level, picks, strict=True)]
            if sites := [site for site, of in enumerate(moves) if of]:
                site = rng.choice(sites)
                picks[site] = rng.choice(moves[site])
    return tuple(walk.settled(picks) or parent)


def _moves(levels: Sequence[float], pick: int, cheaper: bool) -> list[int]:
    """The items of a site that take less of the budget than the one picked, or more."""
    own = levels[pick]
    return [k for k, level in enumerate(levels) if (level < own if cheaper else level > own)]
