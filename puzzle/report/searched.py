"""The front, the choices and the limits of a search, as the page shows them. Pure.

Reads a problem and its solution, if there is one; computes records; writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from puzzle.report.layers import Block, block_of
from puzzle.search import pareto
from puzzle.search.metrics import METRICS
from puzzle.types import Item, ModelShape, PuzzleError, Site, Solution
from puzzle.variants import variant_name

if TYPE_CHECKING:
    from puzzle.search.pareto import Front
    from puzzle.search.problem import Problem, Row

FRONT_POINTS = 160  # that can be clicked on
REACH = 4  # times the chosen objective, up to which the front is drawn
TOLD = ("params", "memory_gib", "kv_cache_gib", "ttft_ms", "tpot_ms", "output_tok_per_s")  # of a point of the front


@dataclass(frozen=True)
class Absent:
    """In the place of a part: why it is not there, in one line that says what to do."""

    reason: str


@dataclass(frozen=True)
class Point:
    """An architecture of the front. ``blocks``: for each site, in order, its place in ``Trade.blocks``.

    ``broken``: the limits that it does not keep; ``totals``: of ``Trade.told``.
    """

    cost: float
    objective: float
    blocks: tuple[int, ...]
    broken: tuple[str, ...]
    totals: tuple[float, ...]


@dataclass(frozen=True)
class Trade:
    """The front between quality and one cost. ``points`` are those that are shown, ``num_points`` are all.

    ``teacher_cost``: None where the teacher is not on offer; ``limits``: of that cost, as written, with its value.
    """

    cost_name: str
    cost_unit: str
    cost_margin: float  # what it may be short of the truth, relative to it
    objective_name: str
    points: tuple[Point, ...]
    chosen: Point | None
    num_points: int
    end: tuple[float, float]  # cost and objective where the whole front begins
    teacher_cost: float | None
    limits: tuple[tuple[str, float], ...]
    told: tuple[tuple[str, str], ...]  # names and units
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class HeatMap:
    """Variants by layers: what each does to the model, what it costs, and how much of the front takes it.

    ``scores``, ``costs`` and ``taken`` are rows of one number a layer, None where a variant is not on offer;
    ``chosen``: the variant of each layer by its place, None where the solution's is none of these.
    """

    part: str
    variants: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    costs: tuple[tuple[float | None, ...], ...]
    taken: tuple[tuple[float | None, ...], ...]
    chosen: tuple[int | None, ...]


@dataclass(frozen=True)
class Reached:
    """A limit, in the metric's unit, and what teacher and solution come to; ``bound``: the upper one, if it has two."""

    written: str
    unit: str
    bound: float
    teacher: float | None
    chosen: float | None
    room: float | None  # from there to the nearer bound, below 0 beyond it


@dataclass(frozen=True)
class Search:
    """What the tables and the limits say, with or without a solution."""

    reached: tuple[Reached, ...]
    trade: Trade | Absent
    maps: tuple[HeatMap, ...]


def searched(problem: Problem, shape: ModelShape, solution: Solution | None) -> Search:
    """What is to be seen of a problem, its front and the solution, if there is one."""
    cost = _cost_name(problem)
    chosen = set(solution.items) if solution else set()
    try:
        front = pareto.front(problem, cost)
    except PuzzleError as error:
        return Search(_reached(problem, solution), Absent(str(error)), _maps(problem, cost, (), chosen))
    places = _shown(front, solution.objective_nats if solution else None)
    taken = [front.chosen(int(place)) for place in places]
    trade = _trade(problem, shape, front, list(zip(places, taken, strict=True)), solution)
    return Search(_reached(problem, solution), trade, _maps(problem, cost, taken, chosen))


def _cost_name(problem: Problem) -> str:
    """What is minimised, else the first cost that is limited, else memory, else parameters: one that adds up."""
    sums = [one.name for one in problem.quantities if one.numerator is None and one.coefficients]
    asked = [] if problem.cost is None else [problem.cost.name]
    asked += [row.quantity.name for row in problem.rows if row.quantity.name.rpartition(".")[2] in METRICS]
    wanted = [*asked, *(name for name in sums if name.endswith("memory_gib")), "params"]
    return next(name for name in wanted if name in sums)


def _shown(front: Front, objective: float | None) -> Sequence[int]:
    """Places of the points to draw, evenly along the cost: down to ``REACH`` times what was chosen, both ends in."""
    near = front.objective <= (REACH * objective if objective and objective > 0 else math.inf)
    first = int(np.argmax(near))  # of none, the first of all
    return [int(place) for place in front.thinned(FRONT_POINTS, first)]


def _trade(
    problem: Problem,
    shape: ModelShape,
    front: Front,
    taken: Sequence[tuple[int, tuple[str, ...]]],
    solution: Solution | None,
) -> Trade:
    blocks: dict[Block, int] = {}
    made_of = {item.id: _blocks(item, shape, problem.sites, blocks) for item in problem.items}
    told = [one for one in problem.quantities if one.name.rpartition(".")[2] in TOLD and one.name != front.cost_name]

    def point(cost: float, objective: float, ids: tuple[str, ...]) -> Point:
        at = {site: block for item_id in ids for site, block in made_of[item_id]}
        linear = [one.constant + math.fsum(one.coefficients.get(item_id, 0.0) for item_id in ids) for one in told]
        totals = [one.numerator / sum_ if one.numerator else sum_ for one, sum_ in zip(told, linear, strict=True)]
        broken = tuple(row.written for row in problem.rows if not row.holds(ids))
        return Point(cost, objective, tuple(at[place] for place in range(len(problem.sites))), broken, tuple(totals))

    chosen = None
    if solution is not None:
        chosen = point(solution.totals[front.cost_name], solution.objective_nats, problem.in_order(solution.items))
    return Trade(
        cost_name=front.cost_name,
        cost_unit=front.cost_unit,
        cost_margin=problem.quantity(front.cost_name).margin,
        objective_name=front.objective_name,
        points=tuple(point(float(front.cost[at]), float(front.objective[at]), ids) for at, ids in taken),
        chosen=chosen,
        num_points=len(front),
        end=(float(front.cost[0]), float(front.objective[0])),
        teacher_cost=front.teacher_cost,
        limits=tuple(
            (row.written, float(bound))
            for row in problem.rows
            if row.quantity.name == front.cost_name
            for bound in dict.fromkeys((row.lower, row.upper))
            if bound is not None
        ),
        told=tuple((one.name, one.unit) for one in told),
        blocks=tuple(blocks),
    )


def _blocks(item: Item, shape: ModelShape, sites: Sequence[Site], known: dict[Block, int]) -> list[tuple[int, int]]:
    """Of each site of the item, by their places; new blocks are added to those that are known."""
    place = {site: index for index, site in enumerate(sites)}
    blocks = {site: block_of(shape, site, spec) for site, spec in item.at.items()}
    return [(place[site], known.setdefault(block, len(known))) for site, block in blocks.items()]


def _maps(problem: Problem, cost: str, taken: Sequence[tuple[str, ...]], chosen: set[str]) -> tuple[HeatMap, ...]:
    """One for items of attention, one for FFNs, and where there are any, of layers and of runs of layers."""
    by_part: dict[str, list[Item]] = {}
    for item in problem.items:
        by_part.setdefault(_part(item), []).append(item)
    counts = Counter(item_id for ids in taken for item_id in ids)
    of_cost = problem.quantity(cost).coefficients
    num_layers = 1 + max(site.layer for site in problem.sites)
    found = []
    for part, items in by_part.items():
        variants = list(dict.fromkeys(_label(item) for item in items))
        at = {(_label(item), item.layers[0]): item.id for item in items}
        ids = [[at.get((variant, layer)) for layer in range(num_layers)] for variant in variants]

        def rows(
            value: Callable[[str], float], ids: list[list[str | None]] = ids
        ) -> tuple[tuple[float | None, ...], ...]:
            return tuple(tuple(None if one is None else value(one) for one in row) for row in ids)

        found.append(
            HeatMap(
                part=part,
                variants=tuple(variants),
                scores=rows(lambda item_id: problem.objective[item_id]),
                costs=rows(lambda item_id: of_cost.get(item_id, 0.0)),
                taken=rows(lambda item_id: counts[item_id] / len(taken)) if taken else (),
                chosen=tuple(
                    next((place for place, row in enumerate(ids) if row[layer] in chosen), None)
                    for layer in range(num_layers)
                ),
            )
        )
    return tuple(found)


def _part(item: Item) -> str:
    if len(item.sites) == 1:
        return item.sites[0].part
    return "layer" if len(item.layers) == 1 else "run of layers"


def _label(item: Item) -> str:
    if _part(item) != "run of layers":
        return "+".join(map(variant_name, item.specs))
    return f"{variant_name(item.specs[0])}, {len(item.layers)} layers"


def _reached(problem: Problem, solution: Solution | None) -> tuple[Reached, ...]:
    teacher = problem.teacher

    def reached(row: Row) -> Reached:
        bound = row.lower if row.upper is None else row.upper
        assert bound is not None, "a row has a bound"
        return Reached(
            row.written,
            row.quantity.unit,
            float(bound),
            None if teacher is None else float(row.quantity.value(teacher)),
            float(row.quantity.value(solution.items)) if solution else None,
            float(row.slack(solution.items)) if solution else None,
        )

    return tuple(map(reached, problem.rows))
