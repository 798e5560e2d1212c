"""What a constraint file means in numbers for one teacher, line by line, before anything is trained or scored.

Reads the file, shapes and costs; computes text: percentages resolved, rates as milliseconds, the teacher's own values
at the same workload, which bounds it breaks itself, what nobody measured. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from puzzle.capabilities import offer, told
from puzzle.config import ConstraintFile
from puzzle.profiling import memory
from puzzle.search.constraints import Bound, bounds, cost_of, cost_rows, teacher_items, teacher_value, workloads
from puzzle.search.fan_out import picks
from puzzle.search.goal import Goal, goal_of
from puzzle.search.metrics import METRICS, Setting
from puzzle.search.problem import Row
from puzzle.types import GIB, Costs, Item, MissingMeasurementError, ModelShape

MODEL = "the model"


@dataclass(frozen=True)
class Line:
    """One bound at one place: a workload at a batch size, or the model. ``teacher`` is what it has there itself."""

    key: str
    place: str
    bound: str
    teacher: str


def meaning(
    shape: ModelShape, items: Sequence[Item], costs: Costs, file: ConstraintFile, tasks: Collection[str] = ()
) -> tuple[str, ...]:
    """Lines of text. ``items`` are the space's, ``tasks`` the scores of the user's own.

    ConfigError for what is wrong with the file; what was not measured is said in the place of a value.
    """
    searches = picks(file)
    lines: dict[Line, None] = {}
    for one in searches:
        lines.update(dict.fromkeys(_lines(shape, costs, one.file, tasks)))
    keys, told_lines = list(file.constraints), []
    width = max((len(line.bound) for line in lines), default=0)
    for place in dict.fromkeys(line.place for line in lines):
        told_lines.append(place)
        here = sorted((line for line in lines if line.place == place), key=lambda line: keys.index(line.key))
        told_lines += [f"  {line.bound:<{width}}  {line.teacher}" for line in here]
    if len(searches) > 1:
        told_lines.append(f"{len(searches)} searches: {'; '.join(str(one) for one in searches)}")
    first = searches[0].file
    goal = goal_of(first, tasks)
    told_lines += _goal(goal, shape, costs, first)
    if (count := file.solutions.count) > 1:
        sites = len(shape.sites)
        least = sites - int((1 - Fraction(str(file.solutions.min_difference))) * sites)
        told_lines.append(
            f"up to {count} solutions, any two with other variants at {max(1, least)} or more of {sites} sites"
        )
    offered = offer(items, file.serve_on, shape)
    told_lines += [f"not on offer: {line}" for line in told(offered.refused)]
    told_lines += [f"on offer: {line}; its costs are those of that form" for line in told(offered.lowered)]
    return tuple(told_lines)


def _lines(shape: ModelShape, costs: Costs, file: ConstraintFile, tasks: Collection[str]) -> Iterator[Line]:
    limits = bounds(file, tasks)
    for bound in limits:
        if bound.metric not in METRICS:
            yield Line(bound.key, MODEL, f"{bound.written}, the sum of the scores", "teacher 0")
            continue
        for setting in _settings(bound, shape, costs, file):
            place = _place(setting) if setting.workload else MODEL
            try:
                (row,) = cost_rows(
                    bound,
                    Setting(shape, costs=costs),
                    [setting] if setting.workload else [],
                    teacher_items(shape),
                    limits,
                )
            except MissingMeasurementError as error:
                yield Line(bound.key, place, bound.written, f"not known: {error}")
                continue
            yield Line(bound.key, place, _meaning(row), _of_teacher(row, setting))


def _settings(bound: Bound, shape: ModelShape, costs: Costs, file: ConstraintFile) -> list[Setting]:
    """Every workload that the bound concerns, at every batch size."""
    if METRICS[bound.metric].workload == "none" or not file.workloads:
        return [Setting(shape, costs=costs)]
    return [
        Setting(shape, workload, size, costs)
        for workload in workloads(file, shape)
        if bound.workload in (None, workload.name)
        for size in workload.batch_sizes
    ]


def _place(setting: Setting) -> str:
    at = setting.served
    gpus = f", {at.tp} GPUs" if at.tp > 1 else ""
    return (
        f"{at.name}: {at.isl} + {at.osl} tokens, batch size {setting.batch_size}, weights {at.weights}, "
        f"KV cache {at.kv}, {at.device}{gpus}, {at.runtime}"
    )


def _meaning(row: Row) -> str:
    if row.quantity.numerator is None:
        return row.written
    lower, upper = row.linear_bounds()
    times = [f"≥ {_number(lower)}" if lower is not None else "", f"≤ {_number(upper)}" if upper is not None else ""]
    return f"{row.written}, so e2e_ms {' and '.join(filter(None, times))} ms"


def _of_teacher(row: Row, setting: Setting) -> str:
    ids = [item.id for item in teacher_items(setting.shape)]
    kept = "keeps it" if row.holds(ids) else "breaks it"
    value = f"teacher {_number(row.quantity.value(ids))} {row.quantity.unit}, {kept}"
    if not row.quantity.name.endswith("memory_gib"):
        return value
    parts = {name: teacher_value(f"{name}_gib", setting) for name in ("weights", "kv_cache")}
    workspace = memory.workspace_bytes(setting.shape, setting.served, setting.batch_size) / GIB
    return (
        f"{value} (weights {_number(parts['weights'])}, KV cache {_number(parts['kv_cache'])}, "
        f"workspace {_number(Fraction(workspace))})"
    )


def _number(value: Fraction) -> str:
    return f"{int(value):,}" if value.denominator == 1 and abs(value) >= 1 else f"{float(value):.4g}"


def _goal(goal: Goal, shape: ModelShape, costs: Costs, file: ConstraintFile) -> list[str]:
    if goal.cost is None:
        return [f"objective: the smallest {goal.quality}, the sum of the scores; the teacher has 0"]
    rate = "largest" if METRICS[goal.cost].tokens else "smallest"
    head = f"objective: the {rate} {file.objective}, and then the smallest {goal.quality}"
    at = [workload for workload in workloads(file, shape) if workload.name == goal.workload]
    found = []
    for setting in [Setting(shape, one, size, costs) for one in at for size in one.batch_sizes] or [Setting(shape)]:
        size = f" at batch size {setting.batch_size}" if setting.workload else ""
        try:
            cost = cost_of(goal, Setting(shape), [setting] if setting.workload else [], teacher_items(shape))
        except MissingMeasurementError as error:
            found.append(f"the teacher's{size} is not known: {error}")
            continue
        assert cost is not None
        value = cost.value([item.id for item in teacher_items(shape)])
        found.append(f"teacher {_number(value)} {cost.unit}{size}")
    return [f"{head}; {'; '.join(found)}"]
