"""What the search must beat: the same variant everywhere, random choices near the budget, and a strong greedy.

Reads a Problem, computes item ids (one per site, in the order of the sites), writes nothing. Only items that cover a
single site take part. Every answer returned keeps every bound exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puzzle.search.problem import Problem, Row
from puzzle.types import ConfigError, InfeasibleError, Item, Site
from puzzle.variants import variant_name

__all__ = ["best_uniform", "feasible_uniform", "greedy", "random_feasible"]

ATTEMPTS_PER_CHOICE = 20
LEAST_STEP = 1e-12  # of a bound: what rounding alone gains could go round in circles


def best_uniform(problem: Problem) -> tuple[str, ...]:
    """One attention variant and one FFN variant at every layer: the feasible pair with the smallest objective.

    InfeasibleError if no pair fits.
    """
    return min(feasible_uniform(problem), key=problem.objective_of)


def feasible_uniform(problem: Problem) -> tuple[tuple[str, ...], ...]:
    """Every feasible architecture that is the same at every layer; InfeasibleError if there is none."""
    by_name: dict[str, dict[str, dict[Site, str]]] = {"attention": {}, "ffn": {}}
    for site, items in _single(problem).items():
        for item in items:
            by_name[site.part].setdefault(variant_name(item.specs[0]), {})[site] = item.id
    candidates = []
    for attention in by_name["attention"].values():
        for ffn in by_name["ffn"].values():
            at = {**attention, **ffn}
            if len(at) == len(problem.sites):  # a variant that failed somewhere cannot be everywhere
                candidates.append(tuple(at[site] for site in problem.sites))
    feasible = tuple(chosen for chosen in candidates if not problem.violations(chosen))
    if not feasible:
        raise InfeasibleError(f"none of {len(candidates)} uniform architectures keeps {_written(problem)}")
    return feasible


def random_feasible(problem: Problem, seed: int, count: int) -> tuple[tuple[str, ...], ...]:
    """Up to ``count`` different feasible architectures that use most of the budget; scores play no part.

    From a uniformly random choice, random steps that lessen what is broken until it fits, then random steps that raise
    the use of the tightest bound until none fits any more. The same seed gives the same answer. InfeasibleError if
    nothing was found.
    """
    walk = _Walk.over(problem, random.Random(seed))
    found: dict[tuple[str, ...], None] = {}
    for _ in range(ATTEMPTS_PER_CHOICE * count):
        chosen = walk.one()
        if chosen is not None and not problem.violations(chosen):
            found[chosen] = None
        if len(found) == count:
            break
    if not found:
        raise InfeasibleError(f"no random architecture keeps {_written(problem)}")
    return tuple(found)


def greedy(problem: Problem) -> tuple[str, ...]:
    """From the cheapest item at every site, upgrades by objective gained per cost along each site's convex hull.

    Within about 3 % of the optimum on real tables (unlike the published greedy). ConfigError unless the problem has
    exactly one bound and that bounds a cost from above; InfeasibleError if the cheapest items do not fit.
    """
    if len(problem.rows) != 1 or problem.rows[0].linear_bounds()[1] is None or problem.conflicts:
        raise ConfigError("the greedy takes exactly one upper bound and no conflicts; use the search")
    (row,) = problem.rows
    hulls = {site: _hull(problem, row, items) for site, items in _single(problem).items()}
    chosen = {site: hull[0].id for site, hull in hulls.items()}
    if not row.holds(chosen.values()):
        raise InfeasibleError(f"{row.written} cannot be met: the cheapest items do not fit")
    steps = []
    for site, hull in hulls.items():
        for rank, (cheap, dear) in enumerate(zip(hull, hull[1:], strict=False)):
            gain = problem.objective[cheap.id] - problem.objective[dear.id]
            price = row.quantity.coefficients[dear.id] - row.quantity.coefficients[cheap.id]
            steps.append((-gain / price, site, rank, cheap.id, dear.id))
    for _, site, _, cheap_id, dear_id in sorted(steps):
        # a step that was too dear breaks the chain of its site; cheaper ones of other sites may still fit
        if chosen[site] == cheap_id and row.holds({**chosen, site: dear_id}.values()):
            chosen[site] = dear_id
    return tuple(chosen[site] for site in problem.sites)


def _hull(problem: Problem, row: Row, items: Sequence[Item]) -> list[Item]:
    """The items on the lower convex hull of objective over cost, from the cheapest to the best."""

    def point(item: Item) -> tuple[float, float]:
        return row.quantity.coefficients[item.id], problem.objective[item.id]

    hull: list[Item] = []
    for item in sorted(items, key=point):
        cost, objective = point(item)
        if hull and objective >= point(hull[-1])[1]:
            continue  # dearer, and no better
        while len(hull) > 1:
            (cost_a, objective_a), (cost_b, objective_b) = point(hull[-2]), point(hull[-1])
            if (objective_a - objective_b) * (cost - cost_b) > (objective_b - objective) * (cost_b - cost_a):
                break
            hull.pop()
        hull.append(item)
    return hull


@dataclass(frozen=True)
class _Walk:
    """``rows[r][site][k]``: what the k-th item at a site adds to row r, whose sum must lie within ``limits[r]``."""

    items: tuple[tuple[Item, ...], ...]
    rows: tuple[tuple[tuple[float, ...], ...], ...]
    limits: tuple[tuple[float, float], ...]
    rng: random.Random

    @classmethod
    def over(cls, problem: Problem, rng: random.Random) -> _Walk:
        by_site = _single(problem)
        items = tuple(tuple(by_site[site]) for site in problem.sites)
        rows, limits = [], []
        for row in problem.rows:
            lower, upper = row.linear_bounds()
            coefficients = row.quantity.coefficients
            rows.append(tuple(tuple(coefficients[item.id] for item in choices) for choices in items))
            limits.append(
                (
                    -math.inf if lower is None else float(lower) - row.quantity.constant,
                    math.inf if upper is None else float(upper) - row.quantity.constant,
                )
            )
        return cls(items, tuple(rows), tuple(limits), rng)

    def one(self) -> tuple[str, ...] | None:
        picks = [self.rng.randrange(len(choices)) for choices in self.items]
        sums = [math.fsum(row[site][pick] for site, pick in enumerate(picks)) for row in self.rows]
        self._climb(picks, sums, self._broken)
        if self._broken(sums) > 0:
            return None
        self._climb(picks, sums, self._unused)
        return tuple(choices[pick].id for choices, pick in zip(self.items, picks, strict=True))

    def _climb(self, picks: list[int], sums: list[float], badness: Callable[[Sequence[float]], float]) -> None:
        """Random single-site steps, each of which lessens ``badness``, until none does or it is zero."""
        steps = [(site, pick) for site, choices in enumerate(self.items) for pick in range(len(choices))]
        moved = True
        while moved and badness(sums) > 0:
            moved = False
            self.rng.shuffle(steps)
            for site, pick in steps:
                after = [
                    total + row[site][pick] - row[site][picks[site]] for total, row in zip(sums, self.rows, strict=True)
                ]
                if badness(after) < badness(sums) - LEAST_STEP:
                    picks[site], sums[:], moved = pick, after, True
                    if badness(sums) == 0:
                        return

    def _broken(self, sums: Sequence[float]) -> float:
        """By how much bounds are exceeded, each relative to itself."""
        return math.fsum(
            max(0.0, (total - upper) / (abs(upper) or 1.0)) + max(0.0, (lower - total) / (abs(lower) or 1.0))
            for total, (lower, upper) in zip(sums, self.limits, strict=True)
        )

    def _unused(self, sums: Sequence[float]) -> float:
        """The share of the tightest upper bound that is left; infinite where a bound is broken, 0 without any."""
        if self._broken(sums) > 0:
            return math.inf
        left = [
            (upper - total) / (abs(upper) or 1.0)
            for total, (_, upper) in zip(sums, self.limits, strict=True)
            if upper < math.inf
        ]
        return min(left, default=0.0)


def _single(problem: Problem) -> dict[Site, list[Item]]:
    by_site: dict[Site, list[Item]] = {site: [] for site in problem.sites}
    for item in problem.items:
        if len(item.sites) == 1:
            by_site[item.sites[0]].append(item)
    for site, items in by_site.items():
        if not items:
            raise ConfigError(f"{site} is covered by items over several sites only; this baseline takes single ones")
    return by_site


def _written(problem: Problem) -> str:
    return " and ".join(row.written for row in problem.rows) or "every site covered"
