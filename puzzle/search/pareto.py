"""The complete front of two sums: every architecture that nothing beats in both quality and one cost.

Reads a Problem, computes a Front, writes at most a PNG. Sites are merged one after the other: from all non-dominated
choices for the sites so far and all items for the next, keep what is not dominated. An item over several sites is taken
at its first; until its last is passed, fronts are kept apart by which later sites are covered already. So are choices
that hold the first items of a conflict, until its last item is passed or taken, which is not allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puzzle import style
from puzzle.search.problem import Problem
from puzzle.search.surface import additive
from puzzle.types import InfeasibleError, Item, PuzzleError, Site, Solution

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]
    from matplotlib.figure import Figure

Numbers = NDArray[np.float64]
Indices = NDArray[np.int32]
MAX_POINTS = 5_000_000
STEEP = 0.12  # of the range of the cost: at the cheap end the objective may be a hundred times as high as elsewhere
FEW_POINTS = 60  # up to which each is marked
GRID_BITS = 50  # sums of whole multiples of 2^-50 of the largest sum are exact in a float, in whatever order


@dataclass(frozen=True)
class _Layer:
    """Points after a site: where each came from. ``item`` -1: the site was covered by an earlier item."""

    cost: Numbers  # (P,) ascending, in grid steps
    objective: Numbers  # (P,) descending
    parent_state: Indices  # (P,) which of the states before
    parent: Indices  # (P,) the point there
    item: Indices  # (P,)


@dataclass(frozen=True, eq=False)
class Front:
    """Points by ascending cost and descending objective. ``teacher_cost`` is None if the teacher is not on offer."""

    cost_name: str
    cost_unit: str
    objective_name: str
    cost: Numbers  # (P,)
    objective: Numbers  # (P,)
    teacher_cost: float | None
    _item_ids: tuple[str, ...] = field(repr=False)
    _steps: tuple[tuple[_Layer, ...], ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.cost)

    def chosen(self, point: int) -> tuple[str, ...]:
        """The item ids of one point, in the order of the sites."""
        state, ids = 0, []
        index = range(len(self))[point]
        for layers in reversed(self._steps):
            layer = layers[state]
            if layer.item[index] >= 0:
                ids.append(self._item_ids[layer.item[index]])
            state, index = int(layer.parent_state[index]), int(layer.parent[index])
        return tuple(reversed(ids))

    def best_within(self, limit: float) -> int | None:
        """The point with the best objective whose cost is at most ``limit``."""
        found = int(np.searchsorted(self.cost, limit, side="right")) - 1
        return found if found >= 0 else None

    def thinned(self, count: int, first: int = 0) -> NDArray[np.intp]:
        """At most ``count`` points from ``first`` on, spread evenly along the cost axis, both ends among them."""
        if len(self) - first <= count:
            return np.arange(first, len(self))
        wanted = np.linspace(self.cost[first], self.cost[-1], count)
        return np.unique(np.searchsorted(self.cost, wanted).clip(first, len(self) - 1))

    def frame(self, count: int | None = None) -> pd.DataFrame:
        """Columns ``point``, the cost's and the objective's name; all points or ``count`` of them."""
        import pandas as pd

        points = np.arange(len(self)) if count is None else self.thinned(count)
        return pd.DataFrame(
            {"point": points, self.cost_name: self.cost[points], self.objective_name: self.objective[points]}
        )


def front(problem: Problem, cost_name: str) -> Front:
    """The front of the problem's objective against the quantity ``cost_name``; its rows are not applied.

    Raises ConfigError for a rate, which is no plain sum, InfeasibleError where no choice covers every site once without
    a conflict, and PuzzleError past 5 million points.
    """
    quantity = additive(problem, cost_name)
    costs, cost_step = _on_grid({item.id: quantity.coefficients.get(item.id, 0.0) for item in problem.items})
    objectives, objective_step = _on_grid(problem.objective)
    steps = _merge(problem, costs, objectives)
    if not steps[-1]:
        without = " without a conflict" if problem.conflicts else ""
        raise InfeasibleError(f"no choice of items covers every site exactly once{without}")
    (last,) = steps[-1]
    teacher = problem.teacher
    return Front(
        cost_name=cost_name,
        cost_unit=quantity.unit,
        objective_name=problem.objective_name,
        cost=last.cost * cost_step + quantity.constant,
        objective=last.objective * objective_step,
        teacher_cost=None if teacher is None else float(quantity.value(teacher)),
        _item_ids=tuple(item.id for item in problem.items),
        _steps=steps,
    )


def _on_grid(values: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """The values as whole multiples of a step so fine that it is below a float's own precision in any sum."""
    reach = math.fsum(map(abs, values.values())) or 1.0
    step = 2.0 ** (math.frexp(reach)[1] - GRID_BITS)
    return {item_id: float(round(value / step)) for item_id, value in values.items()}, step


def _merge(
    problem: Problem, costs: Mapping[str, float], objectives: Mapping[str, float]
) -> tuple[tuple[_Layer, ...], ...]:
    place = {site: index for index, site in enumerate(problem.sites)}
    starting: dict[Site, list[tuple[int, Item]]] = {site: [] for site in problem.sites}
    for index, item in enumerate(problem.items):
        starting[min(item.sites, key=place.__getitem__)].append((index, item))
    links = _links(problem, place)
    in_conflict = frozenset(link.item_id for at in links.values() for link in at)
    starting = {site: _worth_taking(items, costs, objectives, in_conflict) for site, items in starting.items()}
    nothing: Indices = np.zeros(1, np.int32)
    states = {_State(): _Layer(np.zeros(1), np.zeros(1), nothing, nothing, nothing - 1)}
    steps = []
    for site in problem.sites:
        arriving: dict[_State, list[_Layer]] = {}
        for number, (state, layer) in enumerate(states.items()):
            for after, item_index, item_id in _ways(site, state, starting[site], links.get(site, ())):
                cost, objective = (costs[item_id], objectives[item_id]) if item_id else (0.0, 0.0)
                points = len(layer.cost)
                moved = _Layer(
                    layer.cost + cost,
                    layer.objective + objective,
                    np.full(points, number, np.int32),
                    np.arange(points, dtype=np.int32),
                    np.full(points, item_index, np.int32),
                )
                arriving.setdefault(after, []).append(moved)
        states = _worth_keeping({after: _non_dominated(layers) for after, layers in arriving.items()})
        if sum(len(layer.cost) for layer in states.values()) > MAX_POINTS:
            raise PuzzleError(f"the front has more than {MAX_POINTS:,} points; search with bounds instead")
        steps.append(tuple(states.values()))
    return tuple(steps)


@dataclass(frozen=True)
class _State:
    """What the sites to come depend on: which of them are covered, and the conflicts whose items so far are taken."""

    ahead: frozenset[Site] = frozenset()
    open: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Link:
    """An item of a conflict, at the item's first site: the first or the last one of the conflict, or between."""

    conflict: int
    item_id: str
    first: bool
    last: bool


def _links(problem: Problem, place: Mapping[Site, int]) -> dict[Site, list[_Link]]:
    """By site; of conflicts whose items are all there, and can all be taken as far as their first sites tell."""
    links: dict[Site, list[_Link]] = {}
    for number, conflict in enumerate(problem.conflicts):
        items = [problem.by_id[item_id] for item_id in set(conflict.item_ids) if item_id in problem.by_id]
        at = {min(item.sites, key=place.__getitem__): item.id for item in items}
        if len(at) < len(set(conflict.item_ids)):
            continue
        sites = sorted(at, key=place.__getitem__)
        for site in sites:
            links.setdefault(site, []).append(_Link(number, at[site], site == sites[0], site == sites[-1]))
    return links


def _worth_taking(
    items: Sequence[tuple[int, Item]],
    costs: Mapping[str, float],
    objectives: Mapping[str, float],
    in_conflict: frozenset[str],
) -> list[tuple[int, Item]]:
    """The items that none with the same sites and free of conflicts beats or equals: dominated here is everywhere."""
    best: dict[frozenset[Site], float] = {}
    kept = []
    for index, item in sorted(items, key=lambda pair: (costs[pair[1].id], objectives[pair[1].id])):
        sites = frozenset(item.sites)
        if objectives[item.id] < best.get(sites, math.inf):
            kept.append((index, item))
            if item.id not in in_conflict:
                best[sites] = objectives[item.id]
    return kept


def _ways(
    site: Site, state: _State, starting: Sequence[tuple[int, Item]], links: Sequence[_Link]
) -> list[tuple[_State, int, str]]:
    """How ``site`` can be covered: (the state afterwards, index of the item or -1, its id)."""
    if site in state.ahead:
        return [(_State(state.ahead - {site}, state.open.difference(link.conflict for link in links)), -1, "")]
    ways = []
    for index, item in starting:
        rest = frozenset(item.sites) - {site}
        met = {link.conflict: link for link in links if link.item_id == item.id}
        going_on = {number for number, link in met.items() if link.first or number in state.open}
        if not rest & state.ahead and not any(met[number].last for number in going_on):
            open_after = state.open.difference(link.conflict for link in links) | going_on
            ways.append((_State(state.ahead | rest, open_after), index, item.id))
    return ways


def _worth_keeping(states: Mapping[_State, _Layer]) -> dict[_State, _Layer]:
    """Without the points that one equals or beats which has the same sites ahead and fewer conflicts open."""
    kept: dict[_State, _Layer] = {}
    for state, layer in sorted(states.items(), key=lambda pair: len(pair[0].open)):
        for other, rival in kept.items():
            if other.ahead == state.ahead and other.open < state.open:
                layer = _beyond(layer, rival)
        if len(layer.cost):
            kept[state] = layer
    return kept


def _beyond(layer: _Layer, rival: _Layer) -> _Layer:
    """The points of ``layer`` that no point of ``rival`` equals or beats."""
    before = np.searchsorted(rival.cost, layer.cost, side="right") - 1
    best = np.where(before >= 0, rival.objective[before], math.inf)
    kept = layer.objective < best
    return _Layer(*(of[kept] for of in vars(layer).values()))


def _non_dominated(layers: Sequence[_Layer]) -> _Layer:
    cost = np.concatenate([layer.cost for layer in layers])
    objective = np.concatenate([layer.objective for layer in layers])
    order = np.lexsort((objective, cost))
    running = np.minimum.accumulate(objective[order])
    better = np.ones(len(order), bool)
    better[1:] = running[1:] < running[:-1]
    kept = order[better]
    parents = (
        np.concatenate([getattr(layer, name) for layer in layers])[kept] for name in ("parent_state", "parent", "item")
    )
    return _Layer(cost[kept], objective[kept], *parents)


def plot(front: Front, path: Path) -> None:
    """Writes the front as a PNG."""
    style.save(draw(front), path)


def draw(front: Front, chosen: Solution | None = None, count: int = 2000) -> Figure:
    """The front, the teacher and the chosen solution marked."""
    figure = style.new_figure(7, 4.5)
    axes = figure.add_subplot()
    points = front.thinned(count)
    axes.step(
        front.cost[points],
        front.objective[points],
        where="post",
        color=style.ATTENTION,
        marker="." if len(points) <= FEW_POINTS else None,
        label=f"best possible ({len(front):,} points)",
    )
    if front.teacher_cost is not None:
        axes.plot([front.teacher_cost], [0.0], "k*", markersize=12, label="teacher")
    if chosen is not None:
        axes.plot([chosen.totals[front.cost_name]], [chosen.objective_nats], "o", color=style.CHOSEN, label="chosen")
    axes.set_xlabel(f"{front.cost_name} ({front.cost_unit})")
    axes.set_ylabel(quality_label(front.objective_name))
    low, top = heights(front)
    axes.set_ylim(low, top if chosen is None else max(top, 1.1 * chosen.objective_nats))
    if front.objective[0] > top:
        beyond = f"not shown: up to {front.objective[0]:.3g} at {front.cost[0]:.4g}"
        axes.set_title(beyond, loc="left", fontsize=9)
    axes.legend()
    return figure


def heights(front: Front) -> tuple[float, float]:
    """What a picture shows of the objective: not the steep end, where hardly anything is left of the model."""
    first, last = float(front.cost[0]), float(front.cost[-1])
    shown = front.best_within(first + STEEP * (last - first))
    top = float(front.objective[shown or 0]) or float(front.objective[0]) or 1.0
    low = min(0.0, float(front.objective[-1]))
    return low - 0.05 * (top - low), top + 0.05 * (top - low)


def quality_label(objective_name: str) -> str:
    """Of an axis."""
    unit = " (nats per token)" if objective_name.endswith("_nats") else ""
    return f"{objective_name.removesuffix('_nats')}, sum of scores{unit}"
