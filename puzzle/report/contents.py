"""What the page of a run tells, gathered from whatever units there are. Pure.

Reads a run; what a part of the page needs and is not there is told in that part's place: an :class:`Absent` with the
command that makes it. Computes records that charts.py draws and page.py sets; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from puzzle import artifacts, plans, search, training_log, yamlfiles
from puzzle.pruning import change, pruned_shape
from puzzle.report.library import library_frame
from puzzle.report.summary import Design, Summary, problem_of
from puzzle.report.table import Table
from puzzle.report.tournament import standings
from puzzle.run import DEFAULT_SPACE
from puzzle.search import pareto
from puzzle.search.compare import Compared
from puzzle.types import InfeasibleError, Item, MissingMeasurementError, ModelShape, PuzzleError, Solution, from_json
from puzzle.variants import is_teacher, keep_spec, params, variant_name

if TYPE_CHECKING:
    from puzzle.run import Run
    from puzzle.search.pareto import Front
    from puzzle.search.problem import Problem, Row

FRONT_POINTS = 160  # that can be clicked on
REACH = 4  # times the chosen objective, up to which the front is drawn
TOLD = ("params", "memory_gib", "kv_cache_gib", "ttft_ms", "tpot_ms", "output_tok_per_s")  # of a point of the front
Found = TypeVar("Found")


@dataclass(frozen=True)
class Left:
    """A stage that is not finished: how many of its units are not there, or rest on what is no longer so."""

    stage: str
    missing: int
    stale: int
    units: int


@dataclass(frozen=True)
class Absent:
    """In the place of a part: why it is not there, in one line that says what to do."""

    reason: str


@dataclass(frozen=True)
class Block:
    """One variant, and its parameters over those of the teacher's block there; a fused FFN's may be more."""

    name: str
    share: float


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
    """A limit, in the metric's unit, and what teacher and solution come to."""

    written: str
    unit: str
    lower: float | None
    upper: float | None
    teacher: float | None
    chosen: float | None


@dataclass(frozen=True)
class Search:
    """What the tables and the limits say, with or without a solution."""

    reached: tuple[Reached, ...]
    trade: Trade | Absent
    maps: tuple[HeatMap, ...]


@dataclass(frozen=True)
class Trained:
    """One variant's local losses before and after BLD, over layers: geometric means, and the least and most after."""

    part: str
    variant: str
    start: float
    end: float
    least: float
    most: float
    num_layers: int


@dataclass(frozen=True)
class Recipe:
    """``files``: name and text of what to save; ``constraints``: the name of the constraint file, if there is one."""

    constraints: str
    files: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    seconds: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Contents:
    """The page. None: a run of this kind has no such part."""

    title: str
    subtitle: str
    left: tuple[Left, ...]
    summary: Summary | Absent
    design: Design | Absent
    search: Search | Absent | None
    trained: tuple[Trained, ...] | Absent | None
    steps: tuple[Mapping[str, Any], ...] | Absent
    compared: tuple[Compared, ...] | Absent | None
    standings: Table | None
    exports: tuple[str, ...]
    recipe: Recipe

    @classmethod
    def of(cls, run: Run, left: Sequence[Left] = ()) -> Contents:
        searches = run.config.prune is None
        return cls(
            title=run.teacher_name,
            subtitle=_subtitle(run),
            left=tuple(left),
            summary=_told(lambda: _summary(run)),
            design=_told(lambda: _design(run)),
            search=_told(lambda: _search(run)) if searches else None,
            trained=_told(lambda: _trained(run)) if searches else None,
            steps=_told(lambda: _steps(run)),
            compared=_told(lambda: _compared(run)) if searches else None,
            standings=standings(run),
            exports=_exports(run),
            recipe=_recipe(run),
        )


def _told(gather: Callable[[], Found]) -> Found | Absent:
    try:
        return gather()
    except (MissingMeasurementError, InfeasibleError) as error:
        return Absent(str(error))


def _need(stage: str, *units: plans.Planned) -> None:
    if not all(unit.path.exists() for unit in units):
        raise MissingMeasurementError(f"not there yet; run `puzzle {stage} RUN`")
    if any(artifacts.changed_inputs(unit.path, unit.inputs) for unit in units):
        raise MissingMeasurementError(f"what is there was made from other inputs; run `puzzle {stage} RUN --redo`")


def _subtitle(run: Run) -> str:
    if run.config.prune is not None:
        known = run.settled
        return f"pruned: {change(run.shape, pruned_shape(run.pruning, run.shape))}" if known else "to be pruned"
    return f"compressed within {run.limits_name}"


def _summary(run: Run) -> Summary:
    _need("evaluate", *plans.plan_evaluate(run))
    return Summary.of(run)


def _design(run: Run) -> Design:
    if run.config.prune is not None:
        _need("importance", *plans.plan_importance(run))
        _need("tournament", *plans.plan_tournament(run))
    elif not run.solution.exists():
        raise MissingMeasurementError("no architecture was chosen yet; run `puzzle search RUN`")
    return Design.of(run)


def _steps(run: Run) -> tuple[Mapping[str, Any], ...]:
    steps = training_log.read_log(run.student / training_log.NAME)
    if not steps:
        raise MissingMeasurementError("no step was logged yet; run `puzzle kd RUN`")
    return tuple(steps)


def _compared(run: Run) -> tuple[Compared, ...]:
    if not run.comparison.exists():
        raise MissingMeasurementError("nothing was compared yet; run `puzzle compare RUN --true`, then this report")
    found = artifacts.read_unit(run.comparison).payload["compared"]
    return tuple(from_json(Compared, one, run.comparison) for one in found)


def _trained(run: Run) -> tuple[Trained, ...]:
    frame = library_frame(run)
    frame = frame[(frame.loss_start > 0) & (frame.loss_end > 0)]
    frame = frame.assign(part=[site.split(".")[1] if "." in site else "layer" for site in frame.site])
    return tuple(
        Trained(
            str(part),
            str(variant),
            float(np.exp(np.log(of.loss_start.astype(float)).mean())),
            float(np.exp(np.log(of.loss_end.astype(float)).mean())),
            float(of.loss_end.min()),
            float(of.loss_end.max()),
            len(of),
        )
        for (part, variant), of in frame.groupby(["part", "variant"], sort=False)
    )


def _exports(run: Run) -> tuple[str, ...]:
    """One line of each check of each checkpoint that is there."""
    folders = sorted(path for path in (run.student / "export").glob("*") if (path / artifacts.MARKER).exists())
    return tuple(
        f"{folder.name}: {verdict['line']}"
        for folder in folders
        for verdict in artifacts.read_unit(folder).payload["verification"]
    )


def _recipe(run: Run) -> Recipe:
    inputs = [] if run.constraints is None else [run.constraints]
    if run.config.prune is None:
        inputs.append(yamlfiles.locate("space", run.config.space or DEFAULT_SPACE))
        inputs.append(yamlfiles.locate("grid", run.config.profile.grid))
    files = [(path.name, path.read_text(encoding="utf-8")) for path in inputs]
    constraints = "" if run.constraints is None else run.constraints.name
    known = artifacts.read_json(run.folder / "env.json") if (run.folder / "env.json").exists() else {}
    versions = {**known.get("versions", {}), "system": known.get("system", "")}
    seconds: dict[str, float] = {}
    for event in artifacts.read_events(run.events):
        if event["event"] == "finished" and event["stage"] != "report":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    pairs = tuple((name, str(text)) for name, text in versions.items() if text)
    config = ("config.yaml", yamlfiles.dump(run.config))
    return Recipe(constraints, (config, *files), pairs, tuple(seconds.items()))


# --- the search -------------------------------------------------------------------------------------------------


def _search(run: Run) -> Search:
    _need("score", *plans.plan_score(run))
    _need("profile", *plans.plan_profile(run))
    solution = run.solutions()[0] if run.solution.exists() else None
    if solution is not None:
        problem = problem_of(run, solution)
    else:
        tables = run.read_scores(), run.read_costs()
        problem = search.problems(run.shape, run.items, *tables, run.constraint_file, run.space.conflicts())[0]
    return searched(problem, run.shape, solution)


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
    """The first thing that is limited and adds up, else memory, else parameters."""
    sums = [one.name for one in problem.quantities if one.numerator is None and one.coefficients]
    limited = [row.quantity.name for row in problem.rows if row.quantity.name != problem.objective_name]
    wanted = [*limited, *(name for name in sums if name.endswith("memory_gib")), "params"]
    return next(name for name in wanted if name in sums)


def _shown(front: Front, objective: float | None) -> Sequence[int]:
    """Places of the points to draw, evenly along the cost: down to ``REACH`` times what was chosen, both ends in."""
    near = np.flatnonzero(front.objective <= REACH * objective) if objective else np.arange(len(front))
    first = int(near[0]) if len(near) else 0
    wanted = np.linspace(front.cost[first], front.cost[-1], FRONT_POINTS)
    places = np.searchsorted(front.cost, wanted).clip(first, len(front) - 1)
    return [int(place) for place in np.unique(places)]


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


def _blocks(item: Item, shape: ModelShape, sites: Sequence[Any], known: dict[Block, int]) -> list[tuple[int, int]]:
    """Of each site of the item, by their places; new blocks are added to those that are known."""
    place = {site: index for index, site in enumerate(sites)}
    found = []
    for site, spec in zip(item.sites, item.specs, strict=True):
        block = Block(variant_name(spec), round(params(spec, shape) / params(keep_spec(shape, site), shape), 4))
        found.append((place[site], known.setdefault(block, len(known))))
    return found


def _maps(problem: Problem, cost: str, taken: Sequence[tuple[str, ...]], chosen: set[str]) -> tuple[HeatMap, ...]:
    """One for items of attention, one for FFNs, and where there are any, of layers and of runs of layers."""
    by_part: dict[str, list[Item]] = {}
    for item in problem.items:
        by_part.setdefault(_part(item), []).append(item)
    counts: dict[str, int] = {}
    for item_id in (item_id for ids in taken for item_id in ids):
        counts[item_id] = counts.get(item_id, 0) + 1
    of_cost = problem.quantity(cost).coefficients
    num_layers = 1 + max(site.layer for site in problem.sites)
    found = []
    for part, items in by_part.items():
        variants = list(dict.fromkeys(_label(item) for item in items))
        at = {(_label(item), item.sites[0].layer): item.id for item in items}
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
                taken=rows(lambda item_id: counts.get(item_id, 0) / len(taken)) if taken else (),
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
    return "layer" if len({site.layer for site in item.sites}) == 1 else "run of layers"


def _label(item: Item) -> str:
    if _part(item) != "run of layers":
        return "+".join(map(variant_name, item.specs))
    return f"{variant_name(item.specs[0])}, {item.sites[-1].layer - item.sites[0].layer + 1} layers"


def _reached(problem: Problem, solution: Solution | None) -> tuple[Reached, ...]:
    keep = [item for item in problem.items if is_teacher(item)]
    on_offer = sum(len(item.sites) for item in keep) == len(problem.sites)

    def reached(row: Row) -> Reached:
        return Reached(
            row.written,
            row.quantity.unit,
            None if row.lower is None else float(row.lower),
            None if row.upper is None else float(row.upper),
            float(row.quantity.value([item.id for item in keep])) if on_offer else None,
            float(row.quantity.value(solution.items)) if solution else None,
        )

    return tuple(map(reached, problem.rows))
