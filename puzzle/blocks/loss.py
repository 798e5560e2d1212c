"""What a variant is judged by locally: how far its layer, or its site, is from the teacher's (Puzzle, section 2.1).

Normalised MSE ``Σ |o_teacher - o_variant|² / Σ |o_teacher|²`` or one minus the cosine, over the tokens of a batch that
count. ``loss_at: layer``, the paper's: o is the layer's output, an attention variant being followed by the teacher's
frozen FFN; ``site``: o is what the site adds to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.ranks import AddUp, alone
from puzzle.teacher import Context, LayerPass, attention_delta
from puzzle.types import Part

LossAt = Literal["layer", "site"]
LossKind = Literal["mse", "cosine"]


@dataclass(frozen=True)
class Goal:
    """``target`` (B, T, D) fp32, ``weights`` (B, T), and ``total``, the sum that the loss is divided by."""

    target: Tensor
    weights: Tensor
    total: Tensor
    kind: LossKind

    @classmethod
    def of(
        cls,
        target: Tensor,
        context: Context,
        kind: LossKind = "mse",
        add_up: AddUp = alone,
    ) -> Goal:
        """``add_up`` sums tensors in place over those who share the batch."""
        target = target.float()
        each = target.square().sum(-1) if kind == "mse" else torch.ones_like(context.weights)
        total = (each * context.weights).sum()
        add_up([total])
        return cls(target, context.weights, total.clamp_min(1e-30), kind)

    def loss(self, prediction: Tensor) -> Tensor:
        """A scalar: 0 where ``prediction`` is the target, 1 (mse) where it is nothing."""
        if self.kind == "mse":
            each = (prediction - self.target).square().sum(-1)
        else:
            each = 1 - F.cosine_similarity(prediction.float(), self.target, dim=-1)
        return (each * self.weights).sum() / self.total


def target_of(parts: Collection[Part], one: LayerPass, loss_at: LossAt) -> Tensor:
    """What the teacher has where a variant of ``parts`` is compared with it: (B, T, D)."""
    if loss_at == "layer" or len(parts) > 1:
        return one.after
    return one.middle - one.before if "attention" in parts else one.after - one.middle


def prediction_of(
    layer: PuzzleDecoderLayer,
    parts: Collection[Part],
    one: LayerPass,
    loss_at: LossAt,
    ffn_delta: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What ``layer``, a variant in ``parts`` and the teacher's otherwise, has there; ``ffn_delta`` replaces its own."""
    ffn = ffn_delta or layer.ffn_delta
    at_site = loss_at == "site" and len(parts) == 1
    if "attention" not in parts:
        delta = ffn(one.middle)
        return delta if at_site else one.middle + delta
    delta = attention_delta(layer, one.before, one.context)
    if at_site:
        return delta
    middle = one.before + delta
    return middle + ffn(middle)


def local_loss(
    layer: PuzzleDecoderLayer,
    parts: Collection[Part],
    one: LayerPass,
    loss_at: LossAt = "layer",
    kind: LossKind = "mse",
) -> Tensor:
    """The loss of one variant on one batch of the teacher's activations."""
    goal = Goal.of(target_of(parts, one, loss_at), one.context, kind)
    return goal.loss(prediction_of(layer, parts, one, loss_at))
