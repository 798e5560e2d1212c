"""The stage that scores every item, and how the work is laid out: by layers, over ranks, in rounds of sequences."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle import artifacts
from puzzle.memory_plan import Batches, plan_scores
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Planned, Run
from puzzle.scoring.base import Base
from puzzle.scoring.exact import Change, Scorer, Task, Values, finals_of
from puzzle.scoring.sampling import rounds, undecided
from puzzle.stages.common import compute_of, item_weights, machine_of, sequences_of, streamed_teacher, tokens_of
from puzzle.types import ConfigError, Item, Score, to_json
from puzzle.variants import has_weights, is_teacher


def make_score(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Scores what is missing, or this rank's share of it."""
    wanted = {unit.path.stem: unit for unit in missing}
    names = sorted(wanted, key=lambda name: (_first_layer(run, name), name))
    ranks = Ranks.current()
    pieces = shares({name: _cost(run, name) for name in names}, ranks.count, 1)[ranks.rank].pieces
    job = _Job(run)
    for _, group in itertools.groupby(pieces, lambda name: _first_layer(run, name)):
        units = {name: job.changes(run.scored_together[name]) for name in group}
        share = len(units) / max(1, sum(map(len, units.values())))
        found = job.scores([change for changes in units.values() for change in changes], units, share, progress)
        for name, changes in units.items():
            payload = job.payload(run.scored_together[name], {change.name: found[change.name] for change in changes})
            artifacts.publish_json(wanted[name].path, wanted[name].inputs, payload)
            progress.done(name)


def _first_layer(run: Run, name: str) -> int:
    return run.scored_together[name][0].sites[0].layer


def _cost(run: Run, name: str) -> float:
    """What a unit costs against others: the layers that its items go through."""
    return len(run.scored_together[name]) * (run.shape.num_layers - _first_layer(run, name))


class _Job:
    """One base model, and the rounds of sequences that changes to it are scored on."""

    def __init__(self, run: Run) -> None:
        self._run, settings, compute = run, run.config.score, compute_of(run)
        first = sequences_of(run, "score", settings.sequences)
        self._plan = plan_scores(
            run.shape, Batches(len(first), first[0].ids.numel(), compute.dtype.itemsize), machine_of(run)
        )
        teacher = streamed_teacher(run, compute.dtype, self._plan.hold_teacher)
        self._base = Base(teacher, functools.partial(item_weights, run), run.context)
        self._tasks = {name: _task(name, where) for name, where in settings.tasks.items()}
        most = settings.sequences if settings.until_se is None else tokens_of(run).num_sequences("score")
        self._rounds = list(rounds(settings.sequences, most))
        self._scorers: list[Scorer] = []
        self._base_values: list[Values] = []

    def _scorer(self, index: int) -> Scorer:
        """That of one round, made when first needed."""
        if index == len(self._scorers):
            sequences = self._rounds[index]
            batches = sequences_of(self._run, "score", sequences.stop, sequences.start)
            finals = finals_of(Base(self._base.teacher, self._base.read_weights), batches)
            scorer = Scorer(self._base, batches, finals, self._plan.together, self._plan.chunk, self._tasks)
            self._scorers.append(scorer)
            self._base_values.append(scorer.base_values() if self._base.items else {})
        return self._scorers[index]

    def changes(self, items: Sequence[Item]) -> list[Change]:
        """What has to be measured: what is in place already changes nothing, nor does the teacher's own in itself."""
        in_place = {item.id for item in self._base.items}
        touched = {site for item in self._base.items for site in item.sites}
        return [
            Change(item.id, (item,))
            for item in items
            if item.id not in in_place and not (is_teacher(item) and touched.isdisjoint(item.sites))
        ]

    def scores(
        self, changes: Sequence[Change], units: Mapping[str, Sequence[Change]], share: float, progress: Progress
    ) -> dict[str, Values]:
        """The values of changes that begin at one layer; those of units that are undecided on more sequences."""
        found: dict[str, Values] = {}
        still = list(changes)
        for index in range(len(self._rounds)):
            for change, values in self._scorer(index).scores(still) if still else ():
                before = found.get(change.name)
                found[change.name] = values if before is None else _joined(before, values)
                progress.fraction(share if index == 0 else 0.0)
            names = [name for name, of in units.items() if any(change in still for change in of)]
            still = [change for name in names for change in self._undecided(units[name], found)]
        return found

    def _undecided(self, changes: Sequence[Change], found: Mapping[str, Values]) -> Sequence[Change]:
        """All of a unit, so that its scores stay comparable; none where more sequences would tell nothing."""
        until = self._run.config.score.until_se
        kl = {change.name: found[change.name]["kl"] for change in changes}
        finite = {name: values.tolist() for name, values in kl.items() if torch.isfinite(values).all()}
        return changes if until is not None and undecided(finite, until) else []

    def payload(self, items: Sequence[Item], found: Mapping[str, Values]) -> dict[str, Any]:
        """Of one unit: its scores, why items have none, and what the base itself comes to where it is no teacher."""
        reasons = {item.id: self._failure(item, found[item.id]) for item in items if item.id in found}
        failed = {name: reason for name, reason in reasons.items() if reason is not None}
        length = max((len(values["kl"]) for values in found.values()), default=len(self._rounds[0]))
        base = self._of_base(length)
        good = {name: values for name, values in found.items() if name not in failed}
        in_place = {item.id for item in self._base.items}
        good |= {item.id: {m: torch.zeros_like(v) for m, v in base.items()} for item in items if item.id in in_place}
        scores = [
            self._score(name, metric, column - base[metric] if base and name in found else column)
            for name, values in good.items()
            for metric, column in values.items()
        ]
        return {
            "scores": [to_json(score) for score in scores],
            "failed": [{"item_id": name, "reason": reason} for name, reason in failed.items()],
            **({"base": {metric: column.mean().item() for metric, column in base.items()}} if base else {}),
        }

    def _of_base(self, length: int) -> Values:
        joined: Values = {}
        for values in self._base_values:
            joined = _joined(joined, values) if joined else values
        return {metric: column[:length] for metric, column in joined.items()}

    def _score(self, name: str, metric: str, column: Tensor) -> Score:
        tokens, context = self._run.config.data.sequence_tokens, self._run.context_id
        return Score(name, "teacher", context, metric, "score", tuple(column.tolist()), tokens)

    def _failure(self, item: Item, values: Values) -> str | None:
        """Why the item cannot be chosen, if so: its training failed, or its scores are no numbers."""
        if has_weights(item):
            reason = artifacts.read_unit(self._run.trained(self._run.unit_of(item))).payload.get("failed")
            if reason is not None:
                return str(reason)
        finite = all(torch.isfinite(column).all() for column in values.values())
        return None if finite else "its score is not finite"


def _joined(first: Values, second: Values) -> Values:
    return {metric: torch.cat([column, second[metric]]) for metric, column in first.items()}


def _task(name: str, where: str) -> Task:
    """The user's function; the folder that the command was called in is searched too."""
    module, _, function = where.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        task: Task = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"score.tasks.{name}: {where}: {error}") from None
    finally:
        sys.path.pop(0)
    return task
