"""One-pass scores: what a change costs to second order, from the teacher's own gradients. Kept for comparison only.

Near the teacher ``KL = 1/2 delta' F delta``, F the Fisher information of the outputs. With labels drawn from the
teacher's own predictions and g the gradient of their log-likelihood with respect to what a site adds, for a sequence
``v = sum over tokens of g . delta`` and ``KL per token = 1/2 mean v^2 / T``: one forward and, per draw of labels, one
backward pass of the teacher, and of each variant its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.data.batches import Batch
from puzzle.scoring.base import Base
from puzzle.teacher import LayerPass, Teacher, attention_delta, run_layer
from puzzle.types import Item


def gradients(teacher: Teacher, batch: Batch, draws: int, generator: torch.Generator) -> list[list[Tensor]]:
    """By draw, the gradient (B, T, D) at what each site adds, in the order of the sites."""
    context = teacher.context(batch)
    hidden = teacher.embed(batch).requires_grad_()
    added = []
    for index in range(teacher.num_layers):
        layer = teacher.layer(index)
        added.append(attention_delta(layer, hidden, context))
        hidden = hidden + added[-1]
        added.append(layer.ffn_delta(hidden))
        hidden = hidden + added[-1]
    log_p = torch.log_softmax(teacher.top.lm_head(teacher.top.model.norm(hidden))[:, :-1], -1)
    found = []
    for _ in range(draws):
        labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator).view(log_p.shape[:2])
        likelihood = log_p.gather(-1, labels.unsqueeze(-1)).sum()
        found.append(list(torch.autograd.grad(likelihood, added, retain_graph=True)))
    return found


def one_pass_scores(
    base: Base, items: Sequence[Item], batches: Sequence[Batch], draws: int, seed: int = 0
) -> dict[str, float]:
    """By item of one site, its KL (nats per token)."""
    teacher, generator = base.teacher, torch.Generator().manual_seed(seed)
    squares: dict[str, list[Tensor]] = {item.id: [] for item in items}
    for batch in batches:
        of_draws = gradients(teacher, batch, draws, generator)
        with torch.no_grad():
            hidden, context = teacher.embed(batch), teacher.context(batch)
            for index in range(teacher.num_layers):
                one = run_layer(teacher.layer(index), hidden, context)
                for item in [item for item in items if item.sites[0].layer == index]:
                    place = 2 * index + (item.sites[0].part == "ffn")
                    delta = _difference(base, item, one)
                    squares[item.id] += [(of[place] * delta)[:, :-1].sum((1, 2)) ** 2 for of in of_draws]
                hidden = one.after
    tokens = batches[0].ids.shape[1] - 1
    return {name: float(torch.cat(of).mean()) / 2 / tokens for name, of in squares.items()}


def _difference(base: Base, item: Item, one: LayerPass) -> Tensor:
    """What the variant adds beyond what the teacher's block does."""
    layer = base.layer(item.sites[0].layer, [item])
    if item.sites[0].part == "ffn":
        return layer.ffn_delta(one.middle) - (one.after - one.middle)
    return attention_delta(layer, one.before, one.context) - (one.middle - one.before)
