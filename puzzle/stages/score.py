"""The stage that scores every item, and how the work is laid out: by layers, over ranks, in rounds of sequences."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puzzle import artifacts
from puzzle.memory_plan import Batches, plan_one_pass, plan_scores
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Planned, Run
from puzzle.scoring.base import Base
from puzzle.scoring.exact import Change, Scorer, Task, Values, finals_of
from puzzle.scoring.one_pass import SATURATED_NATS, num_draws, one_pass_scores
from puzzle.scoring.sampling import rounds, undecided
from puzzle.stages.common import compute_of, item_weights, machine_of, sequences_of, streamed_teacher, tokens_of
from puzzle.tables import Failure
from puzzle.types import ConfigError, Item, Score, to_json
from puzzle.variants import has_weights, is_teacher


def make_score(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Scores what is missing, or this rank's share of it."""
    wanted = {unit.path.stem: unit for unit in missing}
    names = sorted(wanted, key=lambda name: (_first_layer(run, name), name))
    ranks = Ranks.current()
    pieces = shares({name: _cost(run, name) for name in names}, ranks.count, 1)[ranks.rank].pieces
    if not pieces:
        return
    job = ScoreJob(run)
    units = {name: job.items_to_score(run.scored_together[name]) for name in pieces}
    layers = itertools.groupby(units, lambda name: _first_layer(run, name))
    groups = [units] if run.estimated else [{name: units[name] for name in group} for _, group in layers]
    for group in groups:
        found = job.estimates(group, progress.fraction) if run.estimated else job.scores(group, progress.fraction)
        for name, items in group.items():
            payload = job.payload(run.scored_together[name], {item.id: found[item.id] for item in items})
            artifacts.publish_json(wanted[name].path, wanted[name].inputs, payload)
            progress.done(name)


def _first_layer(run: Run, name: str) -> int:
    return run.scored_together[name][0].sites[0].layer


def _cost(run: Run, name: str) -> float:
    """What a unit costs against others: the layers that its items go through."""
    return len(run.scored_together[name]) * (run.shape.num_layers - _first_layer(run, name))


class ScoreJob:
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

    def scorer(self, index: int) -> Scorer:
        """That of one round, made when first needed."""
        if index == len(self._scorers):
            sequences = self._rounds[index]
            batches = sequences_of(self._run, "score", sequences.stop, sequences.start)
            finals = finals_of(Base(self._base.teacher, self._base.read_weights), batches)
            scorer = Scorer(self._base, batches, finals, self._plan.together, self._plan.chunk, self._tasks)
            self._scorers.append(scorer)
            self._base_values.append(scorer.base_values() if self._base.items else {})
        return self._scorers[index]

    def items_to_score(self, items: Sequence[Item]) -> list[Item]:
        """What is in place already changes nothing, nor do the teacher's own blocks in the teacher."""
        in_place = {item.id for item in self._base.items}
        touched = {site for item in self._base.items for site in item.sites}
        return [
            item
            for item in items
            if item.id not in in_place and not (is_teacher(item) and touched.isdisjoint(item.sites))
        ]

    def scores(self, units: Mapping[str, Sequence[Item]], advance: Callable[[float], None]) -> dict[str, Values]:
        """Exact values of items that begin at one layer, by unit; of units that are undecided on more sequences.

        ``advance`` is called with the share of the units' work that is done.
        """
        found: dict[str, Values] = {}
        still = list(units)
        for index in range(len(self._rounds)):
            items = [item for name in still for item in units[name]]
            for name, values in self._exact(index, items):
                found[name] = _joined(found[name], values) if name in found else values
                advance(0.0 if index else len(units) / len(items))
            still = [name for name in still if self._undecided([found[item.id]["kl"] for item in units[name]])]
        return found

    def _exact(self, index: int, items: Sequence[Item]) -> Iterator[tuple[str, Values]]:
        """Of items that begin at one layer, on the sequences of one round."""
        if items:
            for change, values in self.scorer(index).scores([Change(item.id, (item,)) for item in items]):
                yield change.name, values

    def estimates(self, units: Mapping[str, Sequence[Item]], advance: Callable[[float], None]) -> dict[str, Values]:
        """Values in one pass, of all units; exact ones of what is over several layers, and where no pass can tell."""
        found: dict[str, Values] = {}
        still = {name: [item for item in items if len(_layers(item)) == 1] for name, items in units.items()}
        for index, sequences in enumerate(self._rounds):
            items = [item for of in still.values() for item in of]
            share = 0.0 if index else len(units) / 2
            for name, kl in self._one_pass(sequences, items, share, advance).items():
                found[name] = _joined(found[name], {"kl": kl}) if name in found else {"kl": kl}
            still = {name: of for name, of in still.items() if self._undecided([found[item.id]["kl"] for item in of])}
        everything = sorted((item for of in units.values() for item in of), key=lambda item: min(_layers(item)))
        # not below the bound: above it, or no number
        doubtful = [one for one in everything if one.id not in found or not found[one.id]["kl"].mean() < SATURATED_NATS]
        for _, group in itertools.groupby(doubtful, lambda item: min(_layers(item))):
            found |= dict(self._exact(0, list(group)))
        return found

    def _one_pass(
        self, sequences: range, items: Sequence[Item], share: float, advance: Callable[[float], None]
    ) -> dict[str, Tensor]:
        """KL per sequence, (sequences,), by item; as many batches at a time as fit."""
        if not items:
            return {}
        run = self._run
        batches = sequences_of(run, "score", sequences.stop, sequences.start)
        draws = num_draws(run.config.score.sequences)
        chunk = plan_one_pass(run.shape, Batches(len(batches), batches[0].ids.numel(), 4), draws, machine_of(run))
        by_layer: dict[int, list[Item]] = {}
        for item in items:
            by_layer.setdefault(item.sites[0].layer, []).append(item)
        parts: dict[str, list[Tensor]] = {item.id: [] for item in items}
        starts = range(0, len(batches), chunk)
        done = functools.partial(advance, share / len(starts) / run.shape.num_layers)
        for start in starts:
            part, first = batches[start : start + chunk], sequences.start + start
            for name, kl in one_pass_scores(self._base, by_layer, part, draws, run.config.seed, first, done).items():
                parts[name].append(kl)
        return {name: torch.cat(of) for name, of in parts.items()}

    def _undecided(self, scores: Sequence[Tensor]) -> bool:
        """Whether more sequences may tell a unit's variants apart; all of it gets them, to stay comparable."""
        until = self._run.config.score.until_se
        if until is None or not scores:
            return False
        base = self._of_base(len(scores[0])).get("kl", torch.zeros(()))
        finite = {str(place): (kl - base).tolist() for place, kl in enumerate(scores) if torch.isfinite(kl).all()}
        return bool(undecided(finite, until))

    def records(self, items: Sequence[Item], found: Mapping[str, Values]) -> tuple[list[Score], list[Failure]]:
        """The scores of ``items``, as differences to the base where that is no teacher, and why some have none."""
        reasons = {item.id: self._failure(item, found[item.id]) for item in items if item.id in found}
        base = self._of_base(max((len(values["kl"]) for values in found.values()), default=0))
        scores = [
            self._score(name, metric, column - base[metric] if base else column, estimated=len(found[name]) == 1)
            for name, reason in reasons.items()
            for metric, column in found[name].items()
            if reason is None
        ]
        return scores, [Failure(name, reason) for name, reason in reasons.items() if reason is not None]

    def payload(self, items: Sequence[Item], found: Mapping[str, Values]) -> dict[str, Any]:
        """Of one unit of scores; with what the base comes to, where that is no teacher."""
        scores, failed = self.records(items, found)
        base = self._of_base(max((len(values["kl"]) for values in found.values()), default=len(self._rounds[0])))
        in_place = {item.id for item in self._base.items}
        zeros = {metric: torch.zeros_like(column) for metric, column in base.items()}
        scores += [
            self._score(item.id, metric, column, estimated=False)
            for item in items
            if item.id in in_place
            for metric, column in zeros.items()
        ]
        return {
            "scores": [to_json(score) for score in scores],
            "failed": [to_json(failure) for failure in failed],
            **({"base": {metric: column.mean().item() for metric, column in base.items()}} if base else {}),
        }

    def _of_base(self, length: int) -> Values:
        joined: Values = {}
        for values in self._base_values:
            joined = _joined(joined, values) if joined else values
        return {metric: column[:length] for metric, column in joined.items()}

    def _score(self, name: str, metric: str, column: Tensor, estimated: bool) -> Score:
        tokens, context = self._run.config.data.sequence_tokens, self._run.context_id
        method: Literal["exact", "one-pass"] = "one-pass" if estimated else "exact"
        return Score(name, "teacher", context, metric, "score", tuple(column.tolist()), tokens, method)

    def _failure(self, item: Item, values: Values) -> str | None:
        """Why the item cannot be chosen, if so: its training failed, or its scores are no numbers."""
        if has_weights(item):
            reason = artifacts.read_unit(self._run.trained(self._run.unit_of(item))).payload.get("failed")
            if reason is not None:
                return str(reason)
        finite = all(torch.isfinite(column).all() for column in values.values())
        return None if finite else "its score is not finite"


def _layers(item: Item) -> set[int]:
    return {site.layer for site in item.sites}


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
