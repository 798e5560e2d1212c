"""The stage that scores every item, and how the work is laid out: by layers, over ranks, in rounds of sequences."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puzzle import artifacts
from puzzle.blocks.stream import InMemory, OnDisk, Store
from puzzle.memory_plan import Batches, plan_one_pass, plan_scores
from puzzle.metrics import sequence_means, token_metrics
from puzzle.plans import Planned
from puzzle.progress import Progress
from puzzle.ranks import Ranks, shares
from puzzle.run import Run
from puzzle.scoring.context import ScoringContext
from puzzle.scoring.exact import Change, Scorer, Task, Values, finals_of
from puzzle.scoring.one_pass import SATURATED_NATS, one_pass_scores
from puzzle.scoring.sampling import may_reach, num_draws, rounds, undecided
from puzzle.stages.common import (
    batch_sizes,
    compute_of,
    item_weights,
    machine_of,
    num_batches,
    sequences_of,
    streamed_teacher,
    tokens_of,
)
from puzzle.tables import CONTEXT, OF_BASE
from puzzle.types import ConfigError, FfnSpec, Item, Score, to_json
from puzzle.variants import has_weights, is_teacher, made_of, params


def make_score(run: Run, missing: Sequence[Planned], progress: Progress) -> None:
    """Scores what is missing, or this rank's share of it."""
    wanted = {unit.path.stem: unit for unit in missing}
    if (base := wanted.pop(run.base_score.stem, None)) is not None and Ranks.current().first:
        artifacts.publish_json(base.path, base.inputs, {"scores": [], "base": [to_json(one) for one in _of_base(run)]})
        progress.done(base.path.name)
    names = sorted(wanted, key=lambda name: (_first_layer(run, name), name))
    ranks = Ranks.current()
    pieces = shares({name: _cost(run, name) for name in names}, ranks.count, 1)[ranks.rank].pieces
    if not pieces:
        return
    with ScoreJob(run) as job:
        units = {name: job.items_to_score(run.scored_together[name]) for name in pieces}
        known = job.estimates(units, progress.fraction) if run.estimated else {}
        for _, group in itertools.groupby(units, lambda name: _first_layer(run, name)):
            here = {name: units[name] for name in group}
            found = job.scores(here, known, progress.fraction)
            for name, items in here.items():
                payload = job.payload(run.scored_together[name], {item.id: found[item.id] for item in items})
                artifacts.publish_json(wanted[name].path, wanted[name].inputs, payload)
                progress.done(name)


@torch.no_grad()
def _of_base(run: Run) -> list[Score]:
    """Of the run's own teacher beside the original that it was pruned from; both a layer at a time."""
    assert run.original is not None
    batches, dtype = sequences_of(run, "score", run.num_sequences("score")), compute_of(run).dtype
    own, other = (streamed_teacher(one, dtype) for one in (run, run.original))
    hidden = [finals_of(ScoringContext(one, functools.partial(item_weights, run)), batches) for one in (own, other)]
    heads = own.top.lm_head, other.top.lm_head
    found: dict[str, list[Tensor]] = {metric: [] for metric in OF_BASE}
    for index, batch in enumerate(batches):
        ends = [store.read(index).to(own.device) for store in hidden]
        (tokens,) = token_metrics(ends[:1], ends[1], heads, batch)
        found["kl"].append(sequence_means(tokens.kl_nats, batch))
        found["ce_delta"].append(sequence_means(tokens.ce_nats - tokens.teacher_ce_nats, batch))
    tokens_each = run.config.data.sequence_tokens
    return [
        Score(CONTEXT, "teacher", run.context_id, metric, "score", tuple(torch.cat(of).tolist()), tokens_each, "exact")
        for metric, of in found.items()
    ]


def _first_layer(run: Run, name: str) -> int:
    return run.scored_together[name][0].layers[0]


def _cost(run: Run, name: str) -> float:
    """What a unit costs against others: the layers that its items go through."""
    return len(run.scored_together[name]) * (run.shape.num_layers - _first_layer(run, name))


@dataclass(frozen=True)
class Measured:
    """What is known of an item: ``values`` by metric, on the sequences of so many ``rounds``."""

    values: Values
    rounds: int
    method: Literal["exact", "one-pass"]

    @property
    def trusted(self) -> bool:
        """Whether an estimate lies, for sure, where the second order is enough; not so where it is no number."""
        return self.method == "exact" or not may_reach(self.values["kl"].tolist(), SATURATED_NATS)

    def joined(self, more: Values) -> Measured:
        values = {metric: torch.cat([column, more[metric]]) for metric, column in self.values.items()}
        return replace(self, values=values, rounds=self.rounds + 1)


class ScoreJob:
    """One context, and the rounds of sequences of a split that changes to it are scored on."""

    def __init__(self, run: Run, split: str = "score") -> None:
        self._run, self._split, settings, compute = run, split, run.config.score, compute_of(run)
        most = first = run.num_sequences(split)
        if settings.until_se is not None and split == "score":
            most = tokens_of(run).num_sequences(split)
        self._rounds = list(rounds(first, most))
        self._machine = machine_of(run)
        counts = [num_batches(len(sequences)) for sequences in self._rounds]
        widths = [spec.intermediate_size or 0 for item in run.items for spec in item.specs if isinstance(spec, FfnSpec)]
        wider = max(0, max(widths) - run.shape.intermediate_size)
        self._plan = plan_scores(run.shape, self._sizes(counts[0]), self._machine, sum(counts), wider)
        self._in_memory = [total <= self._plan.in_memory for total in itertools.accumulate(counts)]
        teacher = streamed_teacher(run, compute.dtype, self._plan.hold_teacher)
        self._context = ScoringContext(teacher, functools.partial(item_weights, run), run.context)
        self._tasks = {name: _task(name, where) for name, where in settings.tasks.items()}
        self._files: list[Path] = []
        self._scorers: list[Scorer] = []
        self._context_values: list[Values] = []
        if self._context.items:
            self._scorer(0)  # what the context itself comes to is part of every unit

    def __enter__(self) -> ScoreJob:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)

    def _sizes(self, count: int) -> Batches:
        """Of ``count`` batches, each as large as the largest of any round."""
        return batch_sizes(self._run, count, max(len(sequences) for sequences in self._rounds))

    def _store(self, in_memory: bool) -> Store:
        """Where one stream is kept; a file that a crash leaves is swept away with other half-written things."""
        if in_memory:
            return InMemory()
        path = self._run.folder / f"{artifacts.ASIDE}score-{Ranks.current().rank}-{len(self._files)}"
        self._files.append(path)
        return OnDisk(path)

    def _scorer(self, index: int) -> Scorer:
        """That of one round, made when first needed."""
        while index >= len(self._scorers):
            place, plan = len(self._scorers), self._plan
            batches = sequences_of(self._run, self._split, self._rounds[place].stop, self._rounds[place].start)
            stores = [self._store(self._in_memory[place]) for _ in ("the teacher's last", "the context's stream")]
            finals = finals_of(ScoringContext(self._context.teacher, self._context.read_weights), batches, stores[0])
            scorer = Scorer(self._context, batches, finals, plan.together, plan.chunk, self._tasks, stores[1])
            self._scorers.append(scorer)
            self._context_values.append(scorer.context_values() if self._context.items else {})
        return self._scorers[index]

    def exact(self, changes: Sequence[Change]) -> Iterator[tuple[str, Values]]:
        """Of changes that begin at one layer, on the sequences that all scores begin with; of none, the context's."""
        scorer = self._scorer(0)
        if not all(change.items for change in changes):
            return ((change.name, scorer.context_values()) for change in changes)
        return ((change.name, values) for change, values in scorer.scores(changes))

    def whole(self, name: str, values: Values) -> dict[str, Any]:
        """Of a whole architecture: its scores, or why it has none."""
        if not all(torch.isfinite(column).all() for column in values.values()):
            return {"scores": [], "failed": [{"item_id": name, "reason": "its outputs are not finite"}]}
        return {"scores": [to_json(self._score(name, *one, "exact")) for one in values.items()], "failed": []}

    def items_to_score(self, items: Sequence[Item]) -> list[Item]:
        """What is in place already changes nothing, nor do the teacher's own blocks in the teacher."""
        in_place = {item.id for item in self._context.items}
        touched = {site for item in self._context.items for site in item.sites}
        return [
            item
            for item in items
            if item.id not in in_place and not (is_teacher(item) and touched.isdisjoint(item.sites))
        ]

    def scores(
        self, units: Mapping[str, Sequence[Item]], known: Mapping[str, Measured], advance: Callable[[float], None]
    ) -> dict[str, Measured]:
        """All items of units that begin at one layer: as ``known`` where that can be trusted, else exactly.

        Where nothing was known, units that are undecided are measured on more sequences; else on those of the others.
        ``advance`` is called with the share of the units' work that is done.
        """
        found = {one.id: known[one.id] for items in units.values() for one in items if _trusted(known, one)}
        for index in range(len(self._rounds)):
            wanted = [
                item
                for items in units.values()
                for item in items
                if not _trusted(known, item) and self._goes_on(items, found, known, index)
            ]
            changes = [Change(item.id, (item,)) for item in wanted]
            for change, values in self._scorer(index).scores(changes) if wanted else ():
                new = change.name not in found
                found[change.name] = Measured(values, 1, "exact") if new else found[change.name].joined(values)
                advance(len(units) / len(wanted) * (0.5 if known else 1.0) if index == 0 else 0.0)
        return found

    def _goes_on(
        self, items: Sequence[Item], found: Mapping[str, Measured], known: Mapping[str, Measured], index: int
    ) -> bool:
        """Whether a unit is to be measured in round ``index``."""
        if known:
            return index < max((known[item.id].rounds for item in items if item.id in known), default=1)
        reached = min((found[item.id].rounds for item in items if item.id in found), default=0)
        return reached == index and (index == 0 or self._undecided([found[item.id] for item in items]))

    def estimates(self, units: Mapping[str, Sequence[Item]], advance: Callable[[float], None]) -> dict[str, Measured]:
        """One-pass scores of all items within one layer; of units that are undecided on more sequences."""
        found: dict[str, Measured] = {}
        still = {name: [item for item in items if len(item.layers) == 1] for name, items in units.items()}
        for index, sequences in enumerate(self._rounds):
            items = [item for of in still.values() for item in of]
            share = 0.0 if index else len(units) / 2
            for name, kl in self._one_pass(sequences, items, share, advance).items():
                found[name] = found[name].joined({"kl": kl}) if index else Measured({"kl": kl}, 1, "one-pass")
            still = {name: of for name, of in still.items() if self._undecided([found[item.id] for item in of])}
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
        plan = plan_one_pass(run.shape, self._sizes(len(batches)), draws, self._machine, self._plan.hold_teacher)
        groups: list[list[Item]] = []
        for layer in sorted({item.layers[0] for item in items}):
            here = [item for item in items if item.layers[0] == layer]
            sizes = [sum(params(spec, run.shape) for spec in item.specs) for item in here]
            groups += [[here[place] for place in group] for group in plan.groups(sizes)]
        parts: dict[str, list[Tensor]] = {item.id: [] for item in items}
        starts = range(0, len(batches), plan.chunk)
        done = functools.partial(advance, share / len(starts) / run.shape.num_layers)
        for start in starts:
            part, first = batches[start : start + plan.chunk], sequences.start + start
            for name, kl in one_pass_scores(self._context, groups, part, draws, run.config.seed, first, done).items():
                parts[name].append(kl)
        return {name: torch.cat(of) for name, of in parts.items()}

    def _undecided(self, measured: Sequence[Measured]) -> bool:
        """Whether more sequences may tell a unit's variants apart; all of it gets them, to stay comparable."""
        until, scores = self._run.config.score.until_se, [one.values["kl"] for one in measured]
        if until is None or not scores:
            return False
        context = self._of_context(len(scores[0])).get("kl", torch.zeros(()))
        finite = {str(place): (kl - context).tolist() for place, kl in enumerate(scores) if torch.isfinite(kl).all()}
        return bool(undecided(finite, until))

    def payload(self, items: Sequence[Item], found: Mapping[str, Measured]) -> dict[str, Any]:
        """Of one unit: scores, as differences to the context where that is no teacher; why some items have none; what
        the context itself comes to.

        What is in place already costs nothing. ConfigError where the context's own outputs are not finite.
        """
        reasons = {item.id: self._failure(item, found[item.id]) for item in items if item.id in found}
        length = max((len(one.values["kl"]) for one in found.values()), default=len(self._rounds[0]))
        context = self._of_context(length)
        if not all(torch.isfinite(column).all() for column in context.values()):
            raise ConfigError(
                f"{self._run.context_file}: this model's outputs are not finite; score changes to another"
            )
        in_place = {item.id for item in self._context.items}
        none = {metric: torch.zeros_like(column) for metric, column in context.items()}
        scores = [
            self._score(
                name, metric, column - context[metric][: len(column)] if context else column, found[name].method
            )
            for name, reason in reasons.items()
            for metric, column in found[name].values.items()
            if reason is None
        ]
        scores += [self._score(item.id, *of, "exact") for item in items if item.id in in_place for of in none.items()]
        return {
            "scores": [to_json(score) for score in scores],
            "failed": [{"item_id": name, "reason": reason} for name, reason in reasons.items() if reason is not None],
            "base": [to_json(self._score(CONTEXT, *of, "exact")) for of in context.items()],
        }

    def _of_context(self, length: int) -> Values:
        """On the first ``length`` sequences; nothing where the context is the teacher."""
        metrics = self._context_values[0] if self._context_values else {}
        return {metric: torch.cat([values[metric] for values in self._context_values])[:length] for metric in metrics}

    def _score(self, name: str, metric: str, column: Tensor, method: Literal["exact", "one-pass"]) -> Score:
        tokens, context = self._run.config.data.sequence_tokens, self._run.context_id
        return Score(name, "teacher", context, metric, self._split, tuple(column.tolist()), tokens, method)

    def _failure(self, item: Item, measured: Measured) -> str | None:
        """Why the item cannot be chosen, if so: its training failed, or its scores are no numbers."""
        for part in filter(has_weights, made_of(item, self._run.shape)):
            reason = artifacts.read_unit(self._run.trained(self._run.unit_of(part))).payload.get("failed")
            if reason is not None:
                return str(reason)
        finite = all(torch.isfinite(column).all() for column in measured.values.values())
        return None if finite else "its score is not finite"


def _trusted(known: Mapping[str, Measured], item: Item) -> bool:
    return item.id in known and known[item.id].trusted


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
