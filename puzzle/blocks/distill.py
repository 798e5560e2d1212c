"""Block-wise local distillation (Puzzle, section 2.1): variants learn to do what the teacher's block does.

Reads teacher activations; many variants train on one teacher pass, with no gradient across layers. The loss is the
normalised MSE ``|o_teacher - o_variant|² / |o_teacher|²`` over a batch, where o is (``loss_at: layer``, the paper's)
the layer's output, an attention variant being followed by the teacher's frozen FFN, or (``site``) what the site adds to
the residual stream. The first position is left out: its massive activations would be most of the norm.

Nothing of one variant's result depends on which others train beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.blocks.layer import part_parameters, part_state, variant_layer
from puzzle.config import DistillConfig
from puzzle.modeling import PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.schedule import BETAS, CLIP_NORM, num_steps, warmup_cosine
from puzzle.teacher import Compute, LayerPass, layers_of, run_layers
from puzzle.types import Item, Part


@dataclass(frozen=True)
class Learner:
    """One variant under training, with its own optimiser."""

    item: Item
    layer: PuzzleDecoderLayer
    optimiser: torch.optim.Optimizer

    @property
    def part(self) -> Part:
        return self.item.sites[0].part

    @property
    def index(self) -> int:
        return self.item.sites[0].layer


@dataclass(frozen=True)
class Distilled:
    """A variant's weights after BLD, with its loss on held-out tokens before and after."""

    weights: dict[str, Tensor]
    loss_before: float
    loss_after: float
    tokens: int


def normalised_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """``mean (prediction - target)² / mean target²`` over (B, T, D) without the first position, in fp32."""
    difference = (prediction - target)[:, 1:].float()
    return difference.square().mean() / target[:, 1:].float().square().mean()


def local_loss(learner_layer: PuzzleDecoderLayer, part: Part, one: LayerPass, loss_at: str) -> Tensor:
    """The loss of one variant on one batch of the teacher's activations."""
    if part == "attention":
        delta = learner_layer.attention_delta(one.before, one.position)
        if loss_at == "site":
            return normalised_mse(delta, one.middle - one.before)
        middle = one.before + delta
        return normalised_mse(middle + learner_layer.ffn_delta(middle), one.after)
    delta = learner_layer.ffn_delta(one.middle)
    return (
        normalised_mse(delta, one.after - one.middle)
        if loss_at == "site"
        else normalised_mse(one.middle + delta, one.after)
    )


def make_learner(
    teacher_layer: PuzzleDecoderLayer, item: Item, weights: Mapping[str, Tensor], config: DistillConfig
) -> Learner:
    part, spec = item.sites[0].part, item.specs[0]
    layer = variant_layer(teacher_layer, part, spec, weights)
    layer.requires_grad_(False)
    parameters = [parameter.requires_grad_(True) for parameter in part_parameters(layer, part)]
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
    )
    return Learner(item, layer, optimiser)


def distill(
    model: PuzzleForCausalLM,
    starts: Mapping[Item, Mapping[str, Tensor]],
    batches: Callable[..., Tensor],
    held_out: list[Tensor],
    config: DistillConfig,
    compute: Compute,
    on_step: Callable[[], None] = lambda: None,
) -> dict[Item, Distilled]:
    """Trains every variant in ``starts`` on ``batches(step=step)`` (B, T); all share each batch's one teacher pass."""
    layers = layers_of(model)
    learners = [make_learner(layers[item.sites[0].layer], item, weights, config) for item, weights in starts.items()]
    depth = max(learner.index for learner in learners) + 1
    before = held_out_losses(model, learners, held_out, config.loss_at)
    steps = num_steps(config.tokens, config.batch_size, held_out[0].shape[1])
    warmup_steps = max(1, round(config.warmup_fraction * steps))
    for step in range(steps):
        factor = warmup_cosine(step, steps, warmup_steps)
        ids = batches(step=step).to(compute.device)
        with torch.no_grad(), compute.autocast():
            passes = run_layers(model, ids, depth)
        for learner in learners:
            learner.optimiser.param_groups[0]["lr"] = config.learning_rate * factor
            _train_step(learner, passes[learner.index], config.loss_at, compute)
        on_step()
    after = held_out_losses(model, learners, held_out, config.loss_at)
    tokens = steps * config.batch_size * held_out[0].shape[1]
    return {
        learner.item: Distilled(
            part_state(learner.layer, learner.part), before[learner.item], after[learner.item], tokens
        )
        for learner in learners
    }


def _train_step(learner: Learner, one: LayerPass, loss_at: str, compute: Compute) -> None:
    with compute.autocast():
        loss = local_loss(learner.layer, learner.part, one, loss_at)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learner.optimiser.param_groups[0]["params"], CLIP_NORM)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_losses(
    model: PuzzleForCausalLM, learners: Iterable[Learner], held_out: list[Tensor], loss_at: str
) -> dict[Item, float]:
    """Mean loss of each learner over the held-out batches, in fp32."""
    learners = list(learners)
    depth = max(learner.index for learner in learners) + 1
    totals = {learner.item: 0.0 for learner in learners}
    for ids in held_out:
        passes = run_layers(model, ids, depth)
        for learner in learners:
            totals[learner.item] += local_loss(learner.layer, learner.part, passes[learner.index], loss_at).item()
    return {item: total / len(held_out) for item, total in totals.items()}


__all__ = ["Distilled", "distill", "held_out_losses", "local_loss", "normalised_mse"]
