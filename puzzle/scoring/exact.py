"""Exact scores: put changes into a model, run what comes after them, and compare the outputs with the teacher's.

A change is one item for a score, both parts of a layer, a run of layers, or a whole architecture for the truth about
it. What lies before a change is never computed again; changes that begin at the same layer go on together, so that
each later layer is loaded once for all of them, and so are the teacher's probabilities. Reads a context layer by layer
and batches of one split; holds the residual streams of the changes under way:

    changes * sequences * T * D * 4 bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from puzzle.blocks.stream import InMemory, Store, Stream
from puzzle.data.batches import Batch
from puzzle.metrics import TokenMetrics, sequence_means, token_metrics
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.scoring.context import ScoringContext
from puzzle.teacher import Context, run_layer
from puzzle.types import Item

METRICS: Mapping[str, Callable[[TokenMetrics], Tensor]] = {
    "kl": lambda tokens: tokens.kl_nats,
    "ce_delta": lambda tokens: tokens.ce_nats - tokens.teacher_ce_nats,
    "agreement": lambda tokens: tokens.agreement,
    "hidden_distance": lambda tokens: tokens.hidden_distance,
}
Values = dict[str, Tensor]  # by metric, one value per sequence: (sequences,) fp64 on the CPU
# a metric of the user's own, lower is better: (B, T, D) after the final norm, the head, the batch -> (B,); what is kept
# is the difference to the teacher's
Task = Callable[[Tensor, nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Change:
    """Items that are put in place together."""

    name: str
    items: tuple[Item, ...]

    @property
    def first_layer(self) -> int:
        return min(site.layer for item in self.items for site in item.sites)

    @property
    def layers(self) -> frozenset[int]:
        """Those that the change touches."""
        return frozenset(site.layer for item in self.items for site in item.sites)

    def changes_attention(self, layer: int) -> bool:
        return any(site.layer == layer and site.part == "attention" for item in self.items for site in item.sites)


def finals_of(context: ScoringContext, batches: Sequence[Batch], store: Store | None = None) -> Store:
    """Per batch (B, T, D) after the final norm, in fp32; in ``store``, or in memory."""
    store = store or InMemory()
    stream = Stream.of(context.teacher, batches, torch.float32, store)
    for index in range(context.teacher.num_layers):
        stream.advance(context.layer(index))
    for index in range(len(batches)):
        store.write(index, _final(context, stream.hidden(index)))
    return store


@torch.no_grad()
def _final(context: ScoringContext, hidden: Tensor) -> Tensor:
    return context.teacher.top.model.norm(hidden.float())  # type: ignore[no-any-return]


@dataclass
class Scorer:
    """Scores changes to ``context`` on ``batches``, in the order of the layers they begin at.

    ``finals`` are the teacher's (:func:`finals_of`); the context's stream is kept in ``store``. At most ``together``
    changes are under way at once, on ``chunk`` batches at a time (memory_plan.plan_scores); none of these alters a
    result.
    """

    context: ScoringContext
    batches: Sequence[Batch]
    finals: Store
    together: int = 8
    chunk: int = 1_000_000
    tasks: Mapping[str, Task] = field(default_factory=dict)
    store: Store = field(default_factory=InMemory)

    def __post_init__(self) -> None:
        self._stream = self._started()

    def _started(self) -> Stream:
        return Stream.of(self.context.teacher, self.batches, torch.float32, self.store)

    def context_values(self) -> Values:
        """What the context itself comes to; nothing but zeros and full agreement where it is the teacher."""
        self._go_to(self.context.teacher.num_layers)
        each = [
            self._compare([_final(self.context, self._stream.hidden(index))], index)[0]
            for index in range(len(self.batches))
        ]
        return {metric: torch.cat([values[metric] for values in each]) for metric in each[0]}

    def scores(self, changes: Sequence[Change]) -> Iterator[tuple[Change, Values]]:
        """Every change with its values. All begin at one layer; calls in the order of the layers cost least."""
        if not changes:
            return
        first = changes[0].first_layer
        assert all(change.first_layer == first for change in changes)
        self._go_to(first)
        for start in range(0, len(changes), self.together):
            wave = changes[start : start + self.together]
            yield from zip(wave, self._wave(wave), strict=True)

    def _go_to(self, depth: int) -> None:
        """The context's residual stream at the input of layer ``depth``; going back means starting anew."""
        if self._stream.depth > depth:
            self._stream = self._started()
        while self._stream.depth < depth:
            self._stream.advance(self.context.layer(self._stream.depth))

    @torch.no_grad()
    def _wave(self, changes: Sequence[Change]) -> list[Values]:
        """What changes that go on together come to."""
        columns: list[dict[str, list[Tensor]]] = [{} for _ in changes]
        first = changes[0].first_layer
        layer, own = self.context.layer(first), self._own_layers(changes, first)
        for start in range(0, len(self.batches), self.chunk):
            chunk = range(start, min(start + self.chunk, len(self.batches)))
            beside = {index: self._stream.context(index) for index in chunk}
            under_way: list[dict[int, Tensor]] = [{} for _ in changes]  # by batch
            with self.context.teacher.autocast():
                for index in chunk:
                    one = self._stream.at(layer, index)
                    for place, change in enumerate(changes):
                        if change.changes_attention(first):
                            under_way[place][index] = run_layer(own[place], one.before, one.context).after
                        else:  # one that differs in its FFN alone starts after the context's attention
                            under_way[place][index] = one.middle + own[place].ffn_delta(one.middle)
                for depth in range(first + 1, self.context.teacher.num_layers):
                    self._advance(changes, under_way, beside, depth)
            for index in chunk:
                finals = [_final(self.context, of.pop(index)) for of in under_way]
                for found, values in zip(columns, self._compare(finals, index), strict=True):
                    for metric, column in values.items():
                        found.setdefault(metric, []).append(column)
        return [{metric: torch.cat(parts) for metric, parts in found.items()} for found in columns]

    def _own_layers(self, changes: Sequence[Change], depth: int) -> dict[int, PuzzleDecoderLayer]:
        """The layers at ``depth`` of those changes that touch it, by their places."""
        touching = [place for place, change in enumerate(changes) if depth in change.layers]
        return {place: self.context.layer(depth, changes[place].items) for place in touching}

    def _advance(
        self,
        changes: Sequence[Change],
        under_way: Sequence[dict[int, Tensor]],
        beside: Mapping[int, Context],
        depth: int,
    ) -> None:
        """One layer further, with all changes and batches."""
        own = self._own_layers(changes, depth)
        shared = self.context.layer(depth)
        for place, hidden in enumerate(under_way):
            layer = own.get(place, shared)
            for index, other in beside.items():
                hidden[index] = layer(hidden[index], position_embeddings=other.position, attention_mask=other.masks)

    def _compare(self, finals: Sequence[Tensor], index: int) -> list[Values]:
        """For each of ``finals``, values per sequence of batch ``index`` by metric."""
        batch, top = self.batches[index].to(self.context.teacher.device), self.context.teacher.top
        reference = self.finals.read(index).to(self.context.teacher.device)
        own = {name: task(reference, top.lm_head, batch) for name, task in self.tasks.items()}
        found = []
        for final, tokens in zip(finals, token_metrics(finals, reference, (top.lm_head,) * 2, batch), strict=True):
            values = {metric: sequence_means(of_tokens(tokens), batch) for metric, of_tokens in METRICS.items()}
            for name, task in self.tasks.items():
                values[name] = (task(final, top.lm_head, batch) - own[name]).cpu().double()
            found.append(values)
        return found
