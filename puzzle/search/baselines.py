"""What the search must beat: simpler ways to choose, from the paper and from practice.

Reads a Problem, computes item ids in the order of the sites, writes nothing. Only items that cover a single site take
part, unless a function says otherwise. Every answer returned keeps every bound exactly.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from puzzle.search.linear import minimise
from puzzle.search.problem import Problem, Row
from puzzle.types import ConfigError, InfeasibleError, Item, Site
from puzzle.variants import variant_name

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
    walk = Walk.over(problem, random.Random(seed))
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


def published_greedy(problem: Problem) -> tuple[str, ...]:
    """The greedy that the Puzzle paper compares its MIP with, as its text describes it.

    Layers one after the other, those that are easiest to replace (lowest mean score of their blocks) first. Each takes
    the block with the best score whose costs are within an equal share of what is left of every budget; what it does
    not use is left to those after it; where nothing is within the share, what exceeds it least. Blocks are all pairs of
    an attention and an FFN, and items that cover both.
    ConfigError for bounds from below, and where no layer has blocks; InfeasibleError if the result does not fit.
    """
    budgets = []
    for row in problem.rows:
        lower, upper = row.linear_bounds()
        if lower is not None or upper is None:
            raise ConfigError(f"the published greedy shares out budgets; {row.written} is a bound from below")
        budgets.append(float(upper) - row.quantity.constant)
    blocks = _blocks(problem)
    # relative to the whole budget, so that bytes and milliseconds can be compared
    costs = {
        block: [
            math.fsum(row.quantity.coefficients[item_id] for item_id in block) / (abs(budget) or 1.0)
            for row, budget in zip(problem.rows, budgets, strict=True)
        ]
        for choices in blocks.values()
        for block in choices
    }
    score = {block: math.fsum(problem.objective[item_id] for item_id in block) for block in costs}
    left = [math.copysign(1.0, budget) for budget in budgets]
    chosen: list[str] = []
    order = sorted(blocks, key=lambda layer: math.fsum(score[block] for block in blocks[layer]) / len(blocks[layer]))
    for number, layer in enumerate(order):
        shares = [rest / (len(order) - number) for rest in left]
        over = {
            block: max((cost - share for cost, share in zip(costs[block], shares, strict=True)), default=0.0)
            for block in blocks[layer]
        }
        fitting = [block for block in blocks[layer] if over[block] <= 0]
        best = min(fitting, key=score.__getitem__) if fitting else min(blocks[layer], key=over.__getitem__)
        left = [rest - cost for rest, cost in zip(left, costs[best], strict=True)]
        chosen += best
    return _kept_to(problem, chosen, "the published greedy")


def most_params(problem: Problem) -> tuple[str, ...]:
    """As many parameters as the bounds allow, whatever the scores say; of all items. InfeasibleError if none fit."""
    params = problem.quantity("params").coefficients
    choice = minimise(problem, {item.id: -params.get(item.id, 0.0) for item in problem.items}, problem.rows)
    if choice is None:
        raise InfeasibleError(f"nothing keeps {_written(problem)}")
    return problem.in_order(choice.chosen)


def importance_depth(problem: Problem, importance: Sequence[float]) -> tuple[str, ...]:
    """Whole layers left out, the least important first, until the bounds hold; all others stay the teacher's.

    ``importance``: one number a layer, e.g. Block Importance (Minitron). Runs of layers are spelt by the items that are
    on offer for them. ConfigError where the numbers are not one a layer, InfeasibleError if not even the last helps.
    """
    layers = sorted({site.layer for site in problem.sites})
    if len(importance) != len(layers) or not all(map(math.isfinite, importance)):
        raise ConfigError(f"importance: expected {len(layers)} finite numbers, one a layer, found {len(importance)}")
    order = sorted(layers, key=lambda layer: importance[layers.index(layer)])
    for count in range(len(order) + 1):
        chosen = _spelt(problem, frozenset(order[:count]))
        if chosen is not None and not problem.violations(chosen):
            return chosen
    raise InfeasibleError(f"leaving out whole layers does not keep {_written(problem)}")


def _spelt(problem: Problem, dropped: frozenset[int]) -> tuple[str, ...] | None:
    """The items of the teacher without these layers; None where they are not on offer."""
    fitting = tuple(
        item
        for item in problem.items
        if all(spec.kind == ("skip" if site.layer in dropped else "keep") for site, spec in item.at.items())
    )
    if {site for item in fitting for site in item.sites} != set(problem.sites):
        return None
    ids = {item.id for item in fitting}
    conflicts = tuple(conflict for conflict in problem.conflicts if ids.issuperset(conflict.item_ids))
    choice = minimise(replace(problem, items=fitting, rows=(), conflicts=conflicts), problem.objective, ())
    return None if choice is None else problem.in_order(choice.chosen)


def _blocks(problem: Problem) -> dict[int, list[tuple[str, ...]]]:
    """By layer, every way to fill it with items of its own."""
    blocks: dict[int, list[tuple[str, ...]]] = {}
    for layer in sorted({site.layer for site in problem.sites}):
        sites = [site for site in problem.sites if site.layer == layer]
        singles = [[item.id for item in problem.items if item.sites == (site,)] for site in sites]
        wholes = [(item.id,) for item in problem.items if set(item.sites) == set(sites) and len(sites) > 1]
        blocks[layer] = [*itertools.product(*singles), *wholes]
        if not blocks[layer]:
            raise ConfigError(f"layer {layer} is covered by items over several layers only; this baseline takes others")
    return blocks


def _kept_to(problem: Problem, chosen: Sequence[str], name: str) -> tuple[str, ...]:
    broken = problem.violations(chosen)
    if broken:
        raise InfeasibleError(f"{name} does not keep {' and '.join(broken)}")
    return problem.in_order(chosen)


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
class Walk:
    """Architectures as ``picks``: the number of the item at each site.

    ``rows[r][site][k]``: what the k-th item at a site adds to row r, whose sum must lie within ``limits[r]``.
    """

    items: tuple[tuple[Item, ...], ...]
    rows: tuple[tuple[tuple[float, ...], ...], ...]
    limits: tuple[tuple[float, float], ...]
    rng: random.Random

    @classmethod
    def over(cls, problem: Problem, rng: random.Random) -> Walk:
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
        picks = self.settled([self.rng.randrange(len(choices)) for choices in self.items])
        return None if picks is None else self.ids(picks)

    def settled(self, picks: list[int]) -> list[int] | None:
        """The picks, changed until they fit, and further until none that uses more of the budget does."""
        sums = [math.fsum(row[site][pick] for site, pick in enumerate(picks)) for row in self.rows]
        self._climb(picks, sums, self._broken)
        if self._broken(sums) > 0:
            return None
        self._climb(picks, sums, self._unused)
        return picks

    def ids(self, picks: Sequence[int]) -> tuple[str, ...]:
        return tuple(choices[pick].id for choices, pick in zip(self.items, picks, strict=True))

    def picks_of(self, chosen: Sequence[str]) -> tuple[int, ...] | None:
        """None where an item covers several sites."""
        ids = set(chosen)
        found = [[k for k, item in enumerate(choices) if item.id in ids] for choices in self.items]
        return tuple(at[0] for at in found) if all(found) else None

    @cached_property
    def level(self) -> tuple[tuple[float, ...], ...]:
        """By site and item: what it takes of the budgets, each relative to itself."""
        budgets = [
            (row, upper) for row, (_, upper) in zip(self.rows, self.limits, strict=True) if 0 < abs(upper) < math.inf
        ]
        return tuple(
            tuple(math.fsum(row[site][k] / abs(upper) for row, upper in budgets) for k in range(len(choices)))
            for site, choices in enumerate(self.items)
        )

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
