"""From the constraint file to integer programmes: which items may be chosen, what binds, in numbers.

Reads a :class:`~puzzle.config.ConstraintFile`, scores and costs; computes one :class:`~puzzle.search.problem.Problem`
per combination of the workloads' batch sizes (a list of sizes: the search takes the best). Writes nothing.
A percentage is one of the teacher at the same workload and batch size. A percentage of a rate, with a list of batch
sizes, is one of the teacher's own best among those at which it fits the memory bounds that are given in GiB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from puzzle import formats, variants
from puzzle.capabilities import offer
from puzzle.config import BUILT_IN, OBJECTIVES, ConstraintFile, ValuesFile, score_of
from puzzle.search.goal import Goal, goal_of, is_quality, nearest
from puzzle.search.metrics import METRICS, Setting, known_quantities, quantity
from puzzle.search.problem import Problem, Quantity, Row
from puzzle.tables import ScoreTable
from puzzle.types import (
    ConfigError,
    Conflict,
    Costs,
    Item,
    MissingMeasurementError,
    ModelShape,
    Workload,
)

SIGNS = {"min": "≥", "max": "≤", "eq": "="}
Side = Literal["min", "max", "eq"]
MOST_COMBINATIONS = 1000  # of batch sizes: a programme for each
NEVER_NEGATIVE = ("kl_nats", "hidden_distance")


@dataclass(frozen=True)
class Bound:
    """One limit of the file. ``workload`` None: every workload, or none at all where the metric has none."""

    metric: str
    workload: str | None
    side: Side
    amount: Fraction
    percent: bool
    key: str

    @property
    def written(self) -> str:
        return f"{self.key} {SIGNS[self.side]} {spell(self.amount)}{'%' if self.percent else ''}"


def spell(amount: Fraction) -> str:
    """A number as one would write it: 5e+09, 0.001, 40."""
    return f"{float(amount):.12g}"


def workloads(file: ConstraintFile, shape: ModelShape) -> tuple[Workload, ...]:
    """The file's workloads. ConfigError where a dtype is unknown or the model's positions end before isl + osl."""
    found = []
    for name, entry in file.workloads.items():
        sizes = entry.batch_size if isinstance(entry.batch_size, tuple) else (entry.batch_size,)
        if not sizes:
            raise ConfigError(f"workloads.{name}.batch_size: the list is empty; give at least one batch size")
        workload = Workload(
            name, entry.isl, entry.osl, sizes, entry.weights, entry.kv, entry.device, entry.tp, entry.runtime
        )
        for dtype in (workload.weights, workload.kv):
            formats.format_of(dtype)
        if workload.context_tokens > shape.max_position_embeddings:
            raise ConfigError(
                f"workloads.{name}: isl + osl is {workload.context_tokens} tokens, the teacher takes at most "
                f"{shape.max_position_embeddings}; shorten isl or osl"
            )
        found.append(workload)
    return tuple(found)


def tasks_in(scores: ScoreTable) -> set[str]:
    """The scores of the user's own."""
    return {metric for _, metric in scores.scores} - BUILT_IN


def usable_items(items: Sequence[Item], scores: ScoreTable, metric: str) -> dict[Item, float]:
    """The items with their scores, without those that failed.

    What the context itself costs, where scores are of changes to one, is paid once: at the first site.
    """
    found = scores.means(items, metric)
    first = min(site for item in items for site in item.sites)
    if scores.base and metric not in scores.base:
        raise ConfigError(f"{metric}: what the model that changes are made to has of it is not known; take kl_nats")
    paid = scores.base[metric].mean if scores.base else 0.0
    return {item: found[item.id] + (paid if first in item.sites else 0.0) for item in items if item.id in found}


def problems(
    shape: ModelShape,
    items: Sequence[Item],
    scores: ScoreTable,
    costs: Costs,
    file: ConstraintFile,
    conflicts: Sequence[Conflict] = (),
) -> tuple[Problem, ...]:
    """One problem per combination of batch sizes, in the file's order (the first workload's size moves slowest).

    Items are those that the file's ``serve_on`` leaves on offer. The file must not fan out (fan_out.py).
    """
    tasks = tasks_in(scores)
    goal = goal_of(file, tasks)
    offered = offer(items, file.serve_on, shape)
    served = workloads(file, shape)
    if (combinations := math.prod(len(workload.batch_sizes) for workload in served)) > MOST_COMBINATIONS:
        raise ConfigError(
            f"workloads: their batch sizes are {combinations:,} combinations; at most {MOST_COMBINATIONS:,}"
        )
    limits = bounds(file, tasks)
    objective = usable_items(offered.items, scores, score_of(goal.quality))
    _check_context(served, objective, scores, score_of(goal.quality))
    qualities = _qualities(limits, tuple(objective), scores)
    kept_ids = {item.id for item in objective}
    made, alone = [], Setting(shape, costs=costs, serve_on=file.serve_on)
    for sizes in itertools.product(*(workload.batch_sizes for workload in served)):
        settings = [
            Setting(shape, workload, size, costs, file.serve_on) for workload, size in zip(served, sizes, strict=True)
        ]
        problem = Problem(
            items=tuple(objective),
            sites=shape.sites,
            objective={item.id: score for item, score in objective.items()},
            rows=tuple(
                row
                for bound in limits
                for row in (
                    cost_rows(bound, alone, settings, tuple(objective), limits)
                    if bound.metric in METRICS
                    else [_row(bound, qualities[bound.metric], bound.amount, bound.written)]
                )
            ),
            quantities=(*known_quantities(alone, settings, tuple(objective)), *qualities.values()),
            conflicts=tuple(
                conflict for conflict in (*conflicts, *offered.conflicts) if kept_ids.issuperset(conflict.item_ids)
            ),
            objective_name=goal.quality,
            label=", ".join(f"{workload.name} batch size {size}" for workload, size in zip(served, sizes, strict=True)),
            cost=cost_of(goal, alone, settings, tuple(objective)),
        )
        made.append(problem)
    return tuple(made)


def cost_of(goal: Goal, alone: Setting, settings: Sequence[Setting], items: Sequence[Item]) -> Quantity | None:
    """What is minimised in the place of the quality."""
    if goal.cost is None:
        return None
    at = [setting for setting in settings if goal.workload == setting.served.name]
    return quantity(goal.cost, at[0] if at else alone, items)


def _qualities(limits: Sequence[Bound], items: Sequence[Item], scores: ScoreTable) -> dict[str, Quantity]:
    """The sums of scores that are bounded, by name."""
    names = dict.fromkeys(bound.metric for bound in limits if bound.metric not in METRICS)
    found = {}
    for name in names:
        by_item = usable_items(items, scores, score_of(name))
        unit = "nats" if name.endswith("_nats") else "in its own unit"
        found[name] = Quantity(name, unit, {item.id: score for item, score in by_item.items()})
    return found


def bounds(file: ConstraintFile, tasks: Collection[str] = ()) -> tuple[Bound, ...]:
    """The limits under ``constraints:`` in the file's order. ConfigError for names that mean nothing.

    ``tasks`` are the scores of the user's own, which can be bounded like the built-in ones.
    """
    found = []
    for key, entry in file.constraints.items():
        prefix, name = ("", key) if is_quality(key, tasks) else _metric(file, key, tasks)
        assert not isinstance(entry, ValuesFile), "search/fan_out.py comes first"
        if isinstance(entry, float | int | str):
            amounts: Mapping[Side, float | str | None] = {METRICS[name].scalar if name in METRICS else "max": entry}
        else:
            amounts = {"min": entry.min, "max": entry.max, "eq": entry.eq}
        for side, amount in amounts.items():
            if amount is not None:
                found.append(_bound(key, name, prefix or None, side, amount))
    return tuple(found)


def _metric(file: ConstraintFile, key: str, tasks: Collection[str]) -> tuple[str, str]:
    """Workload (or nothing) and name of the metric that ``key`` bounds."""
    prefix, _, name = key.rpartition(".")
    if is_quality(name, tasks):
        raise ConfigError(f"constraints.{key}: {name} is the model's, not a workload's; write {name!r} alone")
    if name not in METRICS:
        raise ConfigError(f"constraints.{key}: unknown metric {name!r}{nearest(name, [*METRICS, *OBJECTIVES, *tasks])}")
    metric = METRICS[name]
    if prefix and metric.workload == "none":
        raise ConfigError(f"constraints.{key}: {name} is the model's, not a workload's; write {name!r} alone")
    if prefix and prefix not in file.workloads:
        raise ConfigError(f"constraints.{key}: unknown workload {prefix!r}{nearest(prefix, file.workloads)}")
    if metric.workload == "needed" and not file.workloads:
        raise ConfigError(f"constraints.{key}: {name} needs a workload; add one under `workloads:`")
    return prefix, name


def _bound(key: str, name: str, workload: str | None, side: Side, amount: float | str) -> Bound:
    metric = METRICS.get(name)
    if side == "eq" and not (metric and metric.whole):
        whole = ", ".join(known for known, metric in METRICS.items() if metric.whole)
        raise ConfigError(f"constraints.{key}: eq is for whole numbers ({whole}); give {name} a min and a max")
    percent = isinstance(amount, str)
    number = Fraction(amount.rstrip("% ")) if isinstance(amount, str) else Fraction(amount)
    if percent and metric is None:
        raise ConfigError(f"constraints.{key}: the teacher's own {name} is 0: there is nothing to take {amount} of")
    if metric and metric.tokens and number <= 0:
        raise ConfigError(f"constraints.{key}: a rate must be positive, found {spell(number)}")
    if number < 0 and (metric or name in NEVER_NEGATIVE):
        raise ConfigError(f"constraints.{key}: {name} is never below 0, found {spell(number)}")
    return Bound(name, workload, side, number, percent, key)


def cost_rows(
    bound: Bound, alone: Setting, settings: Sequence[Setting], items: Sequence[Item], limits: Sequence[Bound]
) -> list[Row]:
    """The bound in numbers at each setting that it concerns, or of the model ``alone``; ``limits``: all of the file.

    MissingMeasurementError where a time was not measured.
    """
    kind = METRICS[bound.metric].workload
    concerned = [setting for setting in settings if bound.workload in (None, setting.served.name)]
    if kind == "none" or not settings:
        concerned = [alone]
    rows: list[Row] = []
    for setting in concerned:
        measured = quantity(bound.metric, setting, items)
        written = bound.written + (f" ({setting.served.name})" if len(concerned) > 1 else "")
        value = bound.amount
        if bound.percent:
            value = bound.amount / 100 * _teacher(bound, setting, limits)
            written += f" of the teacher = {float(value):.6g} {measured.unit}"
        rows.append(_row(bound, measured, value, written))
    return rows


def _row(bound: Bound, measured: Quantity, value: Fraction, written: str) -> Row:
    if measured.margin >= 1:
        raise ConfigError(
            f"constraints.{bound.key}: predicted times are too uncertain for a limit; lower profile.safety"
        )
    if measured.margin:
        written += f", {measured.margin:.1%} clear of it for the error of predicted times"
    clear = 1 - Fraction(measured.margin)
    lower = value / clear if bound.side in ("min", "eq") else None
    upper = value * clear if bound.side in ("max", "eq") else None
    return Row(measured, written, lower, upper)


def _teacher(bound: Bound, setting: Setting, limits: Sequence[Bound]) -> Fraction:
    """The teacher's value that a percentage refers to."""
    if not METRICS[bound.metric].tokens or len(setting.served.batch_sizes) == 1:
        return teacher_value(bound.metric, setting)
    memory = [
        limit
        for limit in limits
        if limit.metric == "memory_gib"
        and limit.side == "max"
        and not limit.percent
        and limit.workload in (None, setting.served.name)
    ]
    at_sizes = [replace(setting, batch_size=size) for size in setting.served.batch_sizes]
    fitting = [at for at in at_sizes if all(teacher_value("memory_gib", at) <= limit.amount for limit in memory)]
    if not fitting:
        raise ConfigError(
            f"constraints.{bound.key}: the teacher fits {' and '.join(limit.written for limit in memory)} at none of "
            f"the batch sizes of {setting.served.name}, so there is nothing to take {spell(bound.amount)}% of; "
            f"add a smaller batch size or give a number"
        )
    return max(teacher_value(bound.metric, at) for at in fitting)


def teacher_items(shape: ModelShape) -> tuple[Item, ...]:
    """The teacher's own block at every site."""
    return tuple(variants.site_item(site, variants.keep_spec(shape, site)) for site in shape.sites)


def teacher_value(metric: str, setting: Setting) -> Fraction:
    """The teacher's own, which no runtime needs lowered; where costs are of another width, the original's."""
    shape, costs = setting.costs.original or (setting.shape, setting.costs)
    items = teacher_items(shape)
    own = replace(setting, shape=shape, costs=costs, serve_on=())
    return quantity(metric, own, items).value(item.id for item in items)


def _check_context(
    served: Sequence[Workload], objective: Mapping[Item, float], scores: ScoreTable, metric: str
) -> None:
    used = [scores.scores[item.id, metric] for item in objective if (item.id, metric) in scores.scores]
    if not used:
        return
    shortest = min(used, key=lambda score: score.context_tokens)
    for workload in served:
        if workload.context_tokens > shortest.context_tokens:
            raise MissingMeasurementError(
                f"workload {workload.name}: isl + osl is {workload.context_tokens} tokens, but {shortest.item_id} was "
                f"scored on {shortest.context_tokens}; shorten it, or set data.sequence_tokens to at least "
                f"{workload.context_tokens} in a new run"
            )
