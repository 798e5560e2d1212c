"""What is minimised: a sum of scores, or a cost while a sum of scores is bounded (the inverse question). Pure.

Reads the ``objective`` and the bounds of a :class:`~puzzle.config.ConstraintFile`; computes a :class:`Goal`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from puzzle.config import OBJECTIVES, BoundFile, ConstraintFile
from puzzle.search.metrics import METRICS
from puzzle.types import ConfigError


@dataclass(frozen=True)
class Goal:
    """``quality``: the sum of scores, by its name in the file. ``cost``: the metric minimised in its place, if any.

    A rate is made as large as possible. ``workload`` is the cost's, None where it has none.
    """

    quality: str
    cost: str | None = None
    workload: str | None = None


def is_quality(name: str, tasks: Collection[str] = ()) -> bool:
    """Whether ``name`` is a sum of scores: one of OBJECTIVES, or a task of the user's own."""
    return name in OBJECTIVES or name in tasks


def goal_of(file: ConstraintFile, tasks: Collection[str] = ()) -> Goal:
    """The file's objective; ``tasks`` are the scores of the user's own.

    ConfigError for a name that means nothing, and for a cost where nothing bounds the quality from above.
    """
    if is_quality(file.objective, tasks):
        return Goal(file.objective)
    workload, _, name = file.objective.rpartition(".")
    if name not in METRICS:
        allowed = ", ".join([*OBJECTIVES, *sorted(tasks)])
        raise ConfigError(
            f"objective: {file.objective!r} is not on offer; allowed: {allowed}, or a cost such as params or "
            "chat.e2e_ms, with the quality bounded"
        )
    quality = next((key for key in file.constraints if is_quality(key, tasks) and _from_above(file, key)), None)
    if quality is None:
        raise ConfigError(
            f"objective: {file.objective} is a cost, and cheapest is a model without any layer; bound the quality "
            "under constraints, e.g. kl_nats: {max: 0.1}"
        )
    return Goal(quality, name, _workload_of(file, workload, name))


def _from_above(file: ConstraintFile, key: str) -> bool:
    entry = file.constraints[key]
    return not isinstance(entry, BoundFile) or entry.max is not None


def _workload_of(file: ConstraintFile, workload: str, name: str) -> str | None:
    """The workload that a cost is measured at, checked."""
    metric = METRICS[name]
    if metric.scalar == "min" and not metric.tokens:
        raise ConfigError(f"objective: {name} is no cost; bound it, and minimise e.g. params")
    if metric.workload == "none":
        if workload:
            raise ConfigError(f"objective: {name} is the model's, not a workload's; write {name!r} alone")
        return None
    if workload:
        if workload not in file.workloads:
            raise ConfigError(f"objective: unknown workload {workload!r}{nearest(workload, file.workloads)}")
        return workload
    if not file.workloads:
        if metric.workload == "needed":
            raise ConfigError(f"objective: {name} needs a workload; add one under `workloads:`")
        return None
    if len(file.workloads) > 1:
        raise ConfigError(f"objective: {name} of which workload? Write e.g. {next(iter(file.workloads))}.{name}")
    return next(iter(file.workloads))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: what was meant, or what is known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none'}"
