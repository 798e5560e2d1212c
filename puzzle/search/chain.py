"""A nested family: architectures from large to small, each a reduction of the one before, and what nesting them costs.

Reads a Problem, computes a Chain, writes nothing. What is minimised is the sum of the objective over the chain. Two
greedy chains come first: from the loose end each step may only reduce what the one before has, from the tight end each
may only enlarge it. Where the whole fits one integer programme, it is solved, beginning at the better of the two:
every architecture is a copy of the sites, and an item at one rules out at the next what is no reduction of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from puzzle import variants
from puzzle.search.linear import Choice, Cut, minimise
from puzzle.search.problem import Problem, Row
from puzzle.search.programme import EXACT, Effort
from puzzle.search.surface import additive, extremes
from puzzle.types import ConfigError, InfeasibleError, Item, ModelShape, OutOfTimeError, Site, Spec

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

Links = tuple[tuple[str, ...], ...]  # the items of every architecture
NotAfter = Mapping[Site, Mapping[str, frozenset[str]]]  # by site and item there: what is no reduction of it
MOST_VARIABLES = 600  # of the joint programme: of 1500 nothing is gained in its time
JOINT_SECONDS = 20.0  # where the caller names no time
SIZES = ("num_kv_heads", "window_tokens", "sink_tokens", "intermediate_size", "num_experts", "num_active_experts")


@dataclass(frozen=True)
class Link:
    """One architecture of the chain; ``free_objective``: of the best under the same limit without the others."""

    limit: float
    chosen: tuple[str, ...]
    cost: float
    objective: float
    free_objective: float

    @property
    def extra(self) -> float:
        """What nesting costs here."""
        return self.objective - self.free_objective


@dataclass(frozen=True)
class Chain:
    """``bound``: no chain has a sum of objectives below it. ``proven``: none is better than this one."""

    cost_name: str
    objective_name: str
    links: tuple[Link, ...]
    bound: float
    proven: bool

    def frame(self, architectures: bool = False) -> pd.DataFrame:
        """Columns: ``limit``, the cost's and the objective's name, ``free``, ``extra``; ``items``, one text a link."""
        import pandas as pd

        columns: dict[str, list[object]] = {
            "limit": [link.limit for link in self.links],
            self.cost_name: [link.cost for link in self.links],
            self.objective_name: [link.objective for link in self.links],
            "free": [link.free_objective for link in self.links],
            "extra": [link.extra for link in self.links],
        }
        if architectures:
            columns["items"] = [" ".join(link.chosen) for link in self.links]
        return pd.DataFrame(columns)


def is_reduction(after: Spec, before: Spec, shape: ModelShape) -> bool:
    """Whether a site may go from ``before`` to ``after`` along a chain.

    Parameters may not grow, and the kind stays with no size (KV heads, window, sinks, channels, experts) growing; but
    from the teacher's own block everything may follow, and to nothing everything may go. The precision stays the same.
    """
    if after == before or after.kind == "skip":
        return True
    if after.precision != before.precision or variants.params(after, shape) > variants.params(before, shape):
        return False
    if before.kind == "keep":
        return True
    sizes = [(getattr(after, name, None), getattr(before, name, None)) for name in SIZES]
    return after.kind == before.kind and all((new or 0) <= (old or 0) for new, old in sizes)


def even_limits(problem: Problem, cost_name: str, count: int) -> tuple[Fraction, ...]:
    """So many limits from loose to tight, evenly between the most and the least that the cost can be, without them."""
    if count < 2:
        raise ConfigError(f"--points: a chain has at least 2 architectures, found {count}")
    least, most = extremes(problem, additive(problem, cost_name))
    return tuple(most - (most - least) * Fraction(step, count + 1) for step in range(1, count + 1))


def chain(
    problem: Problem, shape: ModelShape, cost_name: str, limits: Sequence[Fraction], effort: Effort = EXACT
) -> Chain:
    """The best chain found under ``limits`` on a cost, from loose to tight; the problem's own rows bind every link.

    ``effort``: of one solve; a joint programme ends after 20 s unless it says otherwise.
    InfeasibleError where no architecture keeps the tightest limit.
    """
    cost = additive(problem, cost_name)
    rows = [(*problem.rows, Row(cost, f"{cost_name} ≤ {float(limit):.6g}", upper=limit)) for limit in limits]
    free = []
    for of in rows:
        choice = minimise(problem, problem.objective, of, effort=effort)
        if choice is None:
            raise InfeasibleError(f"no architecture keeps {' and '.join(row.written for row in of)}")
        free.append(choice)
    not_after = _not_after(problem, shape)

    def no_reductions(chosen: set[str]) -> set[str]:
        return {other for at in not_after.values() for item_id in chosen & set(at) for other in at[item_id]}

    def reduced_to_others(chosen: set[str]) -> set[str]:
        return {item_id for at in not_after.values() for item_id, others in at.items() if others & chosen}

    down = _greedy(problem, rows, no_reductions, effort)  # from the loose end, each of what is left
    up = _greedy(problem, rows[::-1], reduced_to_others, effort)  # from the tight end, each of what can become it
    ways = [down, up and up[::-1]]
    best = min(filter(None, ways), key=lambda way: sum(map(problem.objective_of, way)), default=None)
    bound, proven = sum(choice.bound for choice in free), False
    if len(problem.items) * len(rows) <= MOST_VARIABLES:
        seconds = JOINT_SECONDS if effort.seconds is None else effort.seconds
        joint = _joint(problem, rows, not_after, best, replace(effort, seconds=seconds))
        if joint is not None:
            bound = max(bound, joint[1].bound)
            if best is None or joint[1].total <= problem.objective_of(itertools.chain(*best)):
                best, proven = joint[0], joint[1].proven
    if best is None:
        raise InfeasibleError(
            f"no chain was found whose architectures keep {rows[0][-1].written} to {rows[-1][-1].written}"
        )
    links = [
        Link(
            float(limit),
            problem.in_order(chosen),
            float(cost.value(chosen)),
            float(problem.objective_of(chosen)),
            float(choice.total),
        )
        for limit, chosen, choice in zip(limits, best, free, strict=True)
    ]
    total = sum(link.objective for link in links)
    return Chain(cost_name, problem.objective_name, tuple(links), min(bound, total), proven)


def _not_after(problem: Problem, shape: ModelShape) -> NotAfter:
    at: dict[Site, list[tuple[Item, Spec]]] = {site: [] for site in problem.sites}
    for item in problem.items:
        for site, spec in item.at.items():
            at[site].append((item, spec))
    allowed = functools.cache(lambda after, before: is_reduction(after, before, shape))  # layers share specs
    return {
        site: {
            item.id: frozenset(other.id for other, after in here if not allowed(after, before)) for item, before in here
        }
        for site, here in at.items()
    }


def _greedy(
    problem: Problem, rows: Sequence[Sequence[Row]], banned_by: Callable[[set[str]], set[str]], effort: Effort
) -> Links | None:
    """One link after the other, each the best of what the one before does not ban.

    None where time was up, or that leads to a limit that nothing left keeps (or a bound from below of the problem).
    """
    links: list[tuple[str, ...]] = []
    banned: set[str] = set()
    for of in rows:
        try:
            choice = minimise(problem, problem.objective, of, [Cut(dict.fromkeys(banned, 1), 0)], effort)
        except OutOfTimeError:
            return None
        if choice is None:
            return None
        links.append(choice.chosen)
        banned = banned_by(set(choice.chosen))
    return tuple(links)


def _joint(
    problem: Problem,
    rows: Sequence[Sequence[Row]],
    not_after: NotAfter,
    begin: Links | None,
    effort: Effort,
) -> tuple[Links, Choice] | None:
    """The whole chain as one programme: the sites of every link beside each other, as further layers."""
    depth = 1 + max(site.layer for site in problem.sites)

    def moved(sites: Sequence[Site], link: int) -> tuple[Site, ...]:
        return tuple(replace(site, layer=site.layer + link * depth) for site in sites)

    numbers = range(len(rows))
    items = [replace(item, id=_name(item.id, k), sites=moved(item.sites, k)) for k in numbers for item in problem.items]
    whole = Problem(
        tuple(items),
        tuple(site for k in numbers for site in moved(problem.sites, k)),
        {_name(item_id, k): score for k in numbers for item_id, score in problem.objective.items()},
        tuple(_row_of(row, k) for k in numbers for row in rows[k]),
        conflicts=tuple(
            replace(conflict, item_ids=tuple(_name(item_id, k) for item_id in conflict.item_ids))
            for k in numbers
            for conflict in problem.conflicts
        ),
    )
    # what rules out all of a set rules it out together: one row for them is tighter than one for each
    cuts = [
        Cut(
            {_name(item_id, k): 1 for item_id, more in at.items() if more >= others}
            | {_name(other, k + 1): 1 for other in others},
            1,
        )
        for k in numbers[:-1]
        for at in not_after.values()
        for others in dict.fromkeys(at.values())
        if others
    ]
    ids = [{_name(item_id, k) for item_id in problem.by_id} for k in numbers]
    start = None if begin is None else [_name(item_id, k) for k in numbers for item_id in begin[k]]
    try:
        choice = minimise(whole, whole.objective, whole.rows, cuts, effort, start)
    except OutOfTimeError:
        return None
    if choice is None:
        return None
    return tuple(tuple(name[len(_name("", k)) :] for name in choice.chosen if name in ids[k]) for k in numbers), choice


def _name(item_id: str, link: int) -> str:
    return f"{link}:{item_id}"


def _row_of(row: Row, link: int) -> Row:
    """The row, of the items of one link."""
    moved = {_name(item_id, link): value for item_id, value in row.quantity.coefficients.items()}
    return replace(row, quantity=replace(row.quantity, coefficients=moved), written=f"{row.written}, link {link}")
