"""From the constraint file to integer programmes: which items may be chosen, what binds, in numbers.

Reads a :class:`~puzzle.config.ConstraintFile`, scores and costs; computes one :class:`~puzzle.search.problem.Problem`
per combination of the workloads' batch sizes (a list of sizes: the search takes the best). Writes nothing.
A percentage is one of the teacher at the same workload and batch size. A percentage of a rate, with a list of batch
sizes, is one of the teacher's own best among those at which it fits the memory bounds that are given in GiB.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from puzzle import formats, variants
from puzzle.config import BUILT_IN, OBJECTIVES, ConstraintFile
from puzzle.search.metrics import METRICS, Setting, known_quantities, quantity
from puzzle.search.problem import Problem, Row
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

__all__ = ["OBJECTIVES", "metric_of", "problems", "usable_items", "workloads"]

SIGNS = {"min": "≥", "max": "≤", "eq": "="}
Side = Literal["min", "max", "eq"]


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


def metric_of(objective: str, scores: ScoreTable) -> str:
    """The score that the objective in the file means: one of OBJECTIVES, or a task of the user's own."""
    tasks = {metric for _, metric in scores.scores} - BUILT_IN
    if objective not in OBJECTIVES and objective not in tasks:
        allowed = ", ".join([*OBJECTIVES, *sorted(tasks)])
        raise ConfigError(f"objective: {objective!r} is not on offer; allowed: {allowed}")
    return OBJECTIVES.get(objective, objective)


def usable_items(items: Sequence[Item], scores: ScoreTable, metric: str) -> dict[Item, float]:
    """The items with their scores, without those that failed.

    What the context itself costs, where scores are of changes to one, is paid once: at the first site.
    """
    found = scores.means(items, metric)
    first = min(site for item in items for site in item.sites)
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
    """One problem per combination of batch sizes, in the file's order (the first workload's size moves slowest)."""
    metric = metric_of(file.objective, scores)
    served = workloads(file, shape)
    limits = bounds(file)
    objective = usable_items(items, scores, metric)
    _check_context(served, objective, scores, metric)
    kept_ids = {item.id for item in objective}
    made = []
    for sizes in itertools.product(*(workload.batch_sizes for workload in served)):
        settings = [Setting(shape, workload, size, costs) for workload, size in zip(served, sizes, strict=True)]
        problem = Problem(
            items=tuple(objective),
            sites=shape.sites,
            objective={item.id: score for item, score in objective.items()},
            rows=tuple(row for bound in limits for row in _rows(bound, shape, settings, tuple(objective), limits)),
            quantities=known_quantities(shape, settings, tuple(objective)),
            conflicts=tuple(conflict for conflict in conflicts if kept_ids.issuperset(conflict.item_ids)),
            objective_name=file.objective,
            label=", ".join(f"{workload.name} batch size {size}" for workload, size in zip(served, sizes, strict=True)),
        )
        made.append(problem)
    return tuple(made)


def bounds(file: ConstraintFile) -> tuple[Bound, ...]:
    """The limits under ``constraints:`` in the file's order. ConfigError for names that mean nothing."""
    found = []
    for key, entry in file.constraints.items():
        prefix, _, name = key.rpartition(".")
        if name not in METRICS:
            raise ConfigError(f"constraints.{key}: unknown metric {name!r}{_nearest(name, METRICS)}")
        metric = METRICS[name]
        if prefix and metric.workload == "none":
            raise ConfigError(f"constraints.{key}: {name} is the model's, not a workload's; write {name!r} alone")
        if prefix and prefix not in file.workloads:
            raise ConfigError(f"constraints.{key}: unknown workload {prefix!r}{_nearest(prefix, file.workloads)}")
        if metric.workload == "needed" and not file.workloads:
            raise ConfigError(f"constraints.{key}: {name} needs a workload; add one under `workloads:`")
        if isinstance(entry, float | int | str):
            amounts: Mapping[Side, float | str | None] = {metric.scalar: entry}
        else:
            amounts = {"min": entry.min, "max": entry.max, "eq": entry.eq}
        for side, amount in amounts.items():
            if amount is not None:
                found.append(_bound(key, name, prefix or None, side, amount))
    return tuple(found)


def _bound(key: str, name: str, workload: str | None, side: Side, amount: float | str) -> Bound:
    if side == "eq" and not METRICS[name].whole:
        whole = ", ".join(known for known, metric in METRICS.items() if metric.whole)
        raise ConfigError(f"constraints.{key}: eq is for whole numbers ({whole}); give {name} a min and a max")
    percent = isinstance(amount, str)
    number = Fraction(amount.rstrip("% ")) if isinstance(amount, str) else Fraction(amount)
    if METRICS[name].tokens and number <= 0:
        raise ConfigError(f"constraints.{key}: a rate must be positive, found {spell(number)}")
    return Bound(name, workload, side, number, percent, key)


def _rows(
    bound: Bound, shape: ModelShape, settings: Sequence[Setting], items: Sequence[Item], limits: Sequence[Bound]
) -> list[Row]:
    kind = METRICS[bound.metric].workload
    concerned = [setting for setting in settings if bound.workload in (None, setting.served.name)]
    if kind == "none" or not settings:
        concerned = [Setting(shape)]
    rows = []
    for setting in concerned:
        measured = quantity(bound.metric, setting, items)
        written = bound.written + (f" ({setting.served.name})" if len(concerned) > 1 else "")
        value = bound.amount
        if bound.percent:
            value = bound.amount / 100 * _teacher(bound, setting, limits)
            written += f" of the teacher = {float(value):.6g} {measured.unit}"
        if measured.margin >= 1:
            raise ConfigError(
                f"constraints.{bound.key}: predicted times are too uncertain for a limit; lower profile.safety"
            )
        if measured.margin:
            written += f", {measured.margin:.1%} clear of it for the error of predicted times"
        clear = 1 - Fraction(measured.margin)
        lower = value / clear if bound.side in ("min", "eq") else None
        upper = value * clear if bound.side in ("max", "eq") else None
        rows.append(Row(measured, written, lower, upper))
    return rows


def _teacher(bound: Bound, setting: Setting, limits: Sequence[Bound]) -> Fraction:
    """The teacher's value that a percentage refers to."""
    if not METRICS[bound.metric].tokens or len(setting.served.batch_sizes) == 1:
        return _teacher_value(bound.metric, setting)
    memory = [
        limit
        for limit in limits
        if limit.metric == "memory_gib"
        and limit.side == "max"
        and not limit.percent
        and limit.workload in (None, setting.served.name)
    ]
    at_sizes = [Setting(setting.shape, setting.served, size, setting.costs) for size in setting.served.batch_sizes]
    fitting = [at for at in at_sizes if all(_teacher_value("memory_gib", at) <= limit.amount for limit in memory)]
    if not fitting:
        raise ConfigError(
            f"constraints.{bound.key}: the teacher fits {' and '.join(limit.written for limit in memory)} at none of "
            f"the batch sizes of {setting.served.name}, so there is nothing to take {spell(bound.amount)}% of; "
            f"add a smaller batch size or give a number"
        )
    return max(_teacher_value(bound.metric, at) for at in fitting)


def _teacher_value(metric: str, setting: Setting) -> Fraction:
    items = [variants.site_item(site, variants.keep_spec(setting.shape, site)) for site in setting.shape.sites]
    return quantity(metric, setting, items).value(item.id for item in items)


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
                f"scored on {shortest.context_tokens}; shorten it, or set data.sequence_tokens in a new run"
            )


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none'}"
