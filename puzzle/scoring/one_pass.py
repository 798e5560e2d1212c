"""One-pass scores: what a change costs to second order, from a forward and a few backward passes of the teacher.

Near the teacher KL is quadratic in what changes, ``KL = 1/2 delta' F delta``, delta what a site adds beyond what the
context's does, F the Fisher information of the output distribution. With labels y drawn from the model's own
predictions and g the gradient of ``sum_t log p(y_t)`` with respect to what the site adds,

    v = sum over tokens of g . delta,      KL per token = 1/2 mean over draws of v^2 / T

unbiased for the quadratic term, for every variant of every site at once; relative error about sqrt(2 / N), N sequences
times draws. Above about 0.3 nats KL is no longer quadratic. Layers are read twice, once in each direction; held in the
host's memory are what enters each layer and, for every draw, the gradient at the layer under way; on the device one
layer, a group of its variants, and one batch's gradients (memory_plan.plan_one_pass):

    (layers + 1 + draws) * sequences * T * D * 4 bytes
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puzzle.blocks.stream import Stream
from puzzle.data.batches import Batch
from puzzle.memory_plan import LOGIT_TOKENS
from puzzle.metrics import prediction_weights
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.scoring.context import ScoringContext
from puzzle.teacher import Context, Teacher, attention_delta
from puzzle.types import Item, Part

SATURATED_NATS = 0.3  # from here on the quadratic term is off by more than its own error


def one_pass_scores(
    context: ScoringContext,
    groups: Sequence[Sequence[Item]],
    batches: Sequence[Batch],
    draws: int,
    seed: int,
    first: int = 0,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """By item, KL per token and sequence: (sequences,) fp64 on the CPU.

    The items of a group lie within one layer, and are held together; how they are grouped changes no result.
    The labels depend on ``seed`` and the batch's place alone, of which ``first`` is that of the first one.
    ``on_layer`` is called when a layer is done.
    """
    teacher = context.teacher
    stream = Stream.of(teacher, batches, torch.float32)
    of_layer: dict[int, list[Sequence[Item]]] = {}
    for group in groups:
        (layer,) = {site.layer for item in group for site in item.sites}
        of_layer.setdefault(layer, []).append(group)
    lowest = min(of_layer)
    inputs: list[list[Tensor]] = []
    for index in range(teacher.num_layers):
        if index >= lowest:
            inputs.append([stream.hidden(place).cpu() for place in range(len(batches))])
        stream.advance(context.layer(index))
    seeds = (1_000_003 * seed + first + place for place in range(len(batches)))
    gradients = [
        _at_output(teacher, stream.hidden(place), batch, draws, own).cpu()
        for place, (batch, own) in enumerate(zip(batches, seeds, strict=True))
    ]
    found: dict[str, Tensor] = {}
    for index in reversed(range(lowest, teacher.num_layers)):
        before = inputs.pop()

        def backward(place: int, index: int = index, before: Sequence[Tensor] = before) -> _Backward:
            start, at_output = (of[place].to(teacher.device) for of in (before, gradients))
            return _Backward(teacher, context.layer(index), start, stream.context(place), at_output)

        *first_groups, last_group = of_layer.get(index, [()])
        for group in first_groups:
            found |= _of_group(context, group, batches, backward)
        found |= _of_group(context, last_group, batches, backward, gradients)
        on_layer()
    return {item.id: found[item.id] for group in groups for item in group}


def _of_group(
    context: ScoringContext,
    group: Sequence[Item],
    batches: Sequence[Batch],
    backward: Callable[[int], _Backward],
    gradients: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """KL by item of a group, (sequences,); ``gradients`` are brought to the layer's input, if given."""
    own = {item.id: context.layer(item.layers[0], [item]) for item in group}
    found: dict[str, list[Tensor]] = {item.id: [] for item in group}
    for place, batch in enumerate(batches):
        one = backward(place)
        for item in group:
            squares = one.inner_products(own[item.id], {site.part for site in item.sites}).square().mean(0)
            tokens = _predictions(batch).sum(1).clamp_min(1).to(squares)
            found[item.id].append((squares / 2 / tokens).cpu().double())
        if gradients is not None:
            gradients[place] = one.at_input.cpu()
    return {name: torch.cat(columns) for name, columns in found.items()}


def _at_output(teacher: Teacher, hidden: Tensor, batch: Batch, draws: int, seed: int) -> Tensor:
    """(draws, B, T, D): the gradient of the log-likelihood of drawn labels with respect to the last layer's output."""
    generator = torch.Generator(teacher.device).manual_seed(seed)
    found = torch.zeros(draws, *hidden.shape, device=hidden.device)
    rows, flat = hidden.float().flatten(0, 1), found.flatten(1, 2)  # (N, D), and a view (draws, N, D)
    for start in range(0, len(rows), LOGIT_TOKENS):
        part = rows[start : start + LOGIT_TOKENS].detach().requires_grad_()
        log_p = torch.log_softmax(teacher.top.lm_head(teacher.top.model.norm(part)), -1)  # (n, V)
        labels = torch.multinomial(log_p.detach().exp(), draws, replacement=True, generator=generator)
        for draw in range(draws):
            likelihood = log_p.gather(1, labels[:, draw : draw + 1]).sum()
            (gradient,) = torch.autograd.grad(likelihood, part, retain_graph=draw + 1 < draws)
            flat[draw, start : start + LOGIT_TOKENS] = gradient
    return found * _predictions(batch).to(found).unsqueeze(-1)


def _predictions(batch: Batch) -> Tensor:
    """(B, T): 1 where a position's next token is there and counts."""
    weights = prediction_weights(batch)
    weights[:, -1] = 0
    return weights


class _Backward:
    """One layer's pass over one batch, and the gradients at what its sites add: each (draws, B, T, D), if asked for."""

    def __init__(
        self, teacher: Teacher, layer: PuzzleDecoderLayer, before: Tensor, context: Context, at_output: Tensor
    ) -> None:
        self._teacher, self._context, self._at_output = teacher, context, at_output
        with torch.enable_grad(), teacher.autocast():
            self._start = before.float().requires_grad_()
            self._attention = attention_delta(layer, self._start, context)
            self._middle = (self._start + self._attention).detach().requires_grad_()
            self._ffn = layer.ffn_delta(self._middle)

    @functools.cached_property
    def at_middle(self) -> Tensor:
        return self._at_output + _pulled_back(self._ffn, self._middle, self._at_output)

    @functools.cached_property
    def at_input(self) -> Tensor:
        return self.at_middle + _pulled_back(self._attention, self._start, self.at_middle)

    @torch.no_grad()
    def inner_products(self, own: PuzzleDecoderLayer, parts: set[Part]) -> Tensor:
        """(draws, B): of the gradients with what ``own`` adds in ``parts`` beyond what the layer does."""
        gradient = self.at_middle if parts == {"attention"} else self._at_output
        with self._teacher.autocast():
            if parts == {"ffn"}:
                delta = own.ffn_delta(self._middle) - self._ffn
            elif parts == {"attention"}:
                delta = attention_delta(own, self._start, self._context) - self._attention
            else:
                middle = self._start + attention_delta(own, self._start, self._context)
                delta = middle + own.ffn_delta(middle) - self._middle - self._ffn
        return torch.einsum("nbtd,btd->nb", gradient, delta.float())


def _pulled_back(added: Tensor, start: Tensor, gradients: Tensor) -> Tensor:
    """(draws, B, T, D): each of ``gradients`` at ``added`` carried back to ``start``; 0 for a part that is left out."""
    if not added.requires_grad:
        return torch.zeros_like(gradients)
    return torch.stack([torch.autograd.grad(added, start, one.to(added), retain_graph=True)[0] for one in gradients])
