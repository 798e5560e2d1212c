"""Block-wise local distillation (Puzzle, section 2.1): variants learn to do what the teacher's block does.

Reads teacher activations; many variants train on one teacher pass, with no gradient across layers. An item of one site
trains that site against the teacher's other part, frozen (decoupled); an item of both sites trains both (coupled); the
``narrow`` items of a nested site train one FFN together. See loss.py for what is minimised.

Nothing of one unit's result depends on which others train beside it, nor on how the teacher's activations are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzle.blocks.layer import layer_with, part_parameters, part_state, parts_of
from puzzle.blocks.loss import Goal, prediction_of, target_of
from puzzle.blocks.nested import PrefixFfn, widths_at
from puzzle.blocks.stream import Stream, next_hidden
from puzzle.config import DistillConfig
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.ranks import AddUp, alone
from puzzle.schedule import BETAS, CLIP_NORM, warmup_cosine
from puzzle.teacher import LayerPass, run_layer
from puzzle.types import FfnSpec, Item, Part

NUM_CHECKS = 20  # looks at every unit in a whole training: has it failed, is it still getting better?
LEAST_GAIN = 0.001  # relative, of the held-out loss from check to check


@dataclass(frozen=True)
class Task:
    """A unit to train: its items (several: the widths of a nested FFN) and its weights, by names within the layer."""

    unit: str
    items: tuple[Item, ...]
    weights: Mapping[str, Tensor] = field(repr=False)

    @property
    def layer(self) -> int:
        return self.items[0].layers[0]


@dataclass(frozen=True)
class Distilled:
    """A unit's weights after BLD, by item its loss on held-out tokens before and after, and why it failed, if it did.

    Weights that did not get better than the start are the start's.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    before: Mapping[str, float]
    after: Mapping[str, float]
    tokens: int
    failed: str | None = None


class Learner:
    """One unit under training, with its own optimiser."""

    def __init__(self, start: Task, teacher_layer: PuzzleDecoderLayer, config: DistillConfig) -> None:
        self.start, self._config = start, config
        widest = max(start.items, key=_width)
        self.layer = layer_with(teacher_layer, parts_of(widest), start.weights)
        self.parts: tuple[Part, ...] = tuple(parts_of(widest))
        self._prefix = PrefixFfn(self.layer) if len(start.items) > 1 else None
        self.layer.requires_grad_(False)
        parameters = [parameter for part in self.parts for parameter in part_parameters(self.layer, part)]
        self._parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
        )
        self.tokens = 0
        self.failed: str | None = None
        self.stopped = False
        self._finite = torch.ones((), dtype=torch.bool, device=self._parameters[0].device)
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._checks_without_gain = 0

    def train_step(self, one: LayerPass, goal: Goal, step: int, factor: float, add_up: AddUp) -> None:
        """One update at ``factor`` times the peak rate, on the teacher's pass ``one``."""
        widths = widths_at(step, [_width(item) for item in self.start.items], self.start.unit)
        share = 1 / len(widths) if self._prefix else 1.0
        for width in widths if self._prefix else [0]:
            loss = goal.loss(self._prediction(one, width))
            (loss * share).backward()
        add_up([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        self._finite &= torch.isfinite(norm)  # of the summed gradients: those who share a batch must agree
        self._optimiser.param_groups[0]["lr"] = self._config.learning_rate * factor
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.tokens += self._config.batch_size * one.before.shape[1]

    def losses(self, one: LayerPass, goal: Goal) -> Tensor:
        """(items,): the loss of each item on one batch."""
        return torch.stack([goal.loss(self._prediction(one, _width(item))) for item in self.start.items])

    def _prediction(self, one: LayerPass, width: int) -> Tensor:
        nested = self._prefix
        ffn = None if nested is None else lambda hidden: nested.at(width, hidden)
        return prediction_of(self.layer, self.parts, one, self._config.loss_at, ffn)

    def check_finite(self, step: int) -> None:
        if not bool(self._finite):
            self.failed, self.stopped = f"its loss was not finite within the first {step} steps", True

    def check_gain(self, held_out_loss: float, patience: int) -> None:
        """Remembers the best weights; stops after ``patience`` checks without a gain."""
        best = math.inf if self._best is None else self._best[0]
        gained = held_out_loss < best * (1 - LEAST_GAIN)
        self._checks_without_gain = 0 if gained else self._checks_without_gain + 1
        self.stopped = self._checks_without_gain >= patience
        if held_out_loss < best:
            self._best = (held_out_loss, self.state())

    def state(self) -> dict[str, Tensor]:
        """A copy of the unit's tensors."""
        return {n: t.detach().clone() for part in self.parts for n, t in part_state(self.layer, part).items()}

    def restore_best(self) -> None:
        if self._best is not None:
            self.layer.load_state_dict(self._best[1], strict=False)


def _width(item: Item) -> int:
    spec = item.specs[-1]
    return (spec.intermediate_size or 0) if isinstance(spec, FfnSpec) else 0


def distill(
    starts: Sequence[Task],
    stream: Stream,
    held_out: Stream,
    config: DistillConfig,
    on_step: Callable[[int], None] = lambda num_units: None,
    add_up: AddUp = alone,
) -> dict[str, Distilled]:
    """Trains ``starts`` on the batches of ``stream``, one a step; all of a layer share the teacher's pass over it.

    Both streams stand at the first layer of ``starts``, and stay there. ``add_up`` sums gradients in place over those
    who each train on a part of the batch.
    """
    teacher = stream.teacher
    first, last = stream.depth, max(start.layer for start in starts)
    assert held_out.depth == first <= min(start.layer for start in starts)
    layers = [teacher.layer(index) for index in range(first, last + 1)]
    learners = [Learner(start, layers[start.layer - first], config) for start in starts]
    group = _Group(layers, learners, config, add_up)
    before = group.held_out_losses(held_out, learners)
    num_steps = stream.num_batches
    check_steps = max(1, num_steps // NUM_CHECKS)
    for step in range(num_steps):
        active = [learner for learner in learners if not learner.stopped]
        if not active:
            break
        factor = warmup_cosine(step, num_steps, max(1, round(config.warmup_fraction * num_steps)))
        group.step(active, stream, step, factor)
        on_step(len(active))
        if (step + 1) % check_steps == 0 or step + 1 == num_steps:
            group.check(active, held_out, step + 1)
    for learner in learners:
        learner.restore_best()
    after = group.held_out_losses(held_out, learners)
    return {learner.start.unit: _result(learner, before[index], after[index]) for index, learner in enumerate(learners)}


def _result(learner: Learner, before: Tensor, after: Tensor) -> Distilled:
    failed = learner.failed
    if failed is None and not torch.isfinite(torch.stack([before, after])).all():
        failed = "its loss is not finite"
    worse = failed is not None or after.mean() > before.mean()
    weights, losses = (learner.start.weights, before) if worse else (learner.state(), after)
    names = [item.id for item in learner.start.items]
    by_item = [dict(zip(names, of.tolist(), strict=True)) for of in (before, losses)]
    return Distilled(weights, by_item[0], by_item[1], learner.tokens, failed)


@dataclass(frozen=True)
class _Group:
    """The teacher's layers in question, and who learns from them."""

    layers: Sequence[PuzzleDecoderLayer]
    learners: Sequence[Learner]
    config: DistillConfig
    add_up: AddUp

    def step(self, active: Sequence[Learner], stream: Stream, step: int, factor: float) -> None:
        for one, learners in self._passes(active, stream, step):
            goals = self._goals(learners, one, self.add_up)
            for learner in learners:
                with stream.teacher.autocast():
                    learner.train_step(one, goals[learner.parts], step, factor, self.add_up)

    def check(self, active: Sequence[Learner], held_out: Stream, step: int) -> None:
        for learner in active:
            learner.check_finite(step)
        if self.config.patience is None:
            return
        still = [learner for learner in active if not learner.stopped]
        for learner, losses in zip(still, self.held_out_losses(held_out, still), strict=True):
            learner.check_gain(losses.mean().item(), self.config.patience)

    @torch.no_grad()
    def held_out_losses(self, held_out: Stream, learners: Sequence[Learner]) -> list[Tensor]:
        """Per learner (items,) fp64 on the CPU: mean over the held-out batches."""
        sums = [torch.zeros(len(learner.start.items), dtype=torch.float64) for learner in learners]
        place = {id(learner): index for index, learner in enumerate(learners)}
        for index in range(held_out.num_batches):
            for one, of_layer in self._passes(learners, held_out, index):
                goals = self._goals(of_layer, one, alone)
                for learner in of_layer:
                    with held_out.teacher.autocast():
                        sums[place[id(learner)]] += learner.losses(one, goals[learner.parts]).cpu().double()
        return [total / held_out.num_batches for total in sums]

    def _passes(self, learners: Sequence[Learner], stream: Stream, index: int) -> list[tuple[LayerPass, list[Learner]]]:
        """The teacher's pass over one batch at each layer that has learners."""
        last = max(learner.start.layer for learner in learners)
        found = []
        with torch.no_grad(), stream.teacher.autocast():
            hidden, context = stream.hidden(index), stream.context(index)
            for layer in self.layers:
                if layer.layer_idx > last:
                    break
                one = run_layer(layer, hidden, context)
                of_layer = [learner for learner in learners if learner.start.layer == layer.layer_idx]
                if of_layer:
                    found.append((one, of_layer))
                hidden = next_hidden(one, stream.teacher.dtype)
        return found

    def _goals(self, learners: Sequence[Learner], one: LayerPass, add_up: AddUp) -> dict[tuple[Part, ...], Goal]:
        """What learners of these parts are compared with; in a fixed order, as sums over devices need it."""
        config = self.config
        return {
            parts: Goal.of(target_of(parts, one, config.loss_at), one.context, config.loss, add_up)
            for parts in sorted({learner.parts for learner in learners})
        }
