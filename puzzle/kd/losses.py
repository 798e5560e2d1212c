"""What a student is told to be like: its predictions, and its residual stream where the config asks for it.

Loss per token (Puzzle, section 4; Minitron, section 3.2), means over all tokens of a step:

    logits = kl_weight · D(teacher, student) + lm_weight · CE
    layers = Σ_l [ cosine_weight · (1 − cos(M h_student^l, h_teacher^l)) + mse_weight · ‖M h_student^l − h_teacher^l‖² / ‖h_teacher^l‖² ]
    loss = logits + α · layers

with h^l the residual stream after layer l (and, with ``match_embedding``, before the first), D = KL(teacher ‖ student)
unless the config says otherwise. M is the identity, or, where the widths differ, one learned matrix for all layers: the
stream has one basis. α is 1, or logits / layers, without gradient (Minitron's dynamic weight), taken from the step
before, so that it does not depend on how a step is cut into pieces.

A student's layer is compared with the teacher's that ends nearest to it, in shares of the depth. Where a model was made
of layers of another, ``layers_from`` in its config says of which ones, numbered as in the first model of that line, which
had ``layers_of``: so a layer is compared with the one that it was made of, by however many steps, where that is there.

Shapes: B batch, T tokens, D hidden size.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.config import KdConfig
from puzzle.data.batches import Batch
from puzzle.metrics import cross_entropy_sum, divergence_sum, prediction_weights, sampled_kl_sum
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import context_of, embed, layers_of, load_config
from puzzle.types import ConfigError

EMBEDDING = -1  # stands for the output of the embedding among the numbers of layers
RIDGE = 1e-6  # of the mean diagonal, in the fit of the map between widths


def check_comparable(student: Path, teacher: Path) -> None:
    """ConfigError where the two models in these folders cannot be compared; reads their configs alone."""
    own, other = load_config(student), load_config(teacher)
    if own.vocab_size != other.vocab_size:
        raise ConfigError(
            f"kd: the student ({student}) predicts {own.vocab_size} tokens and the teacher ({teacher}) "
            f"{other.vocab_size}; predictions are compared token by token, so both need the same vocabulary"
        )
    layer_pairs(own, other, embedding=False)


def layer_pairs(student: PuzzleConfig, teacher: PuzzleConfig, embedding: bool) -> tuple[tuple[int, int], ...]:
    """Which of the student's layers is compared with which of the teacher's."""
    others = _ends(teacher)
    later_first = range(len(others) - 1, -1, -1)
    pairs = tuple(
        (place, min(later_first, key=lambda layer: abs(others[layer] - end)))
        for place, end in enumerate(_ends(student, len(others)))
    )
    return (((EMBEDDING, EMBEDDING),) if embedding else ()) + pairs


def _ends(model: PuzzleConfig, made_of_depth: int | None = None) -> list[Fraction]:
    """Where each layer ends, in shares of the depth. ``made_of_depth``: of what ``layers_from`` numbers, where the
    config does not say; None: then it is not counted."""
    count = model.num_hidden_layers
    made_of, depth = getattr(model, "layers_from", None), getattr(model, "layers_of", made_of_depth)
    if made_of is None or depth in (None, count):
        made_of, depth = range(count), count
    if len(made_of) != count or not all(0 <= layer < depth for layer in made_of):
        raise ConfigError(
            f"layers_from in the student's config is {made_of}; it must name one of the teacher's {depth} layers for "
            f"each of the student's {count}"
        )
    return [Fraction(layer + 1, depth) for layer in made_of]


@dataclass(frozen=True)
class Counts:
    """What the means of a step are over, all its pieces and ranks together."""

    predictions: float  # of the divergence
    labels: float  # of the cross-entropy: the last position's is not in the batch
    tokens: int

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        weights = prediction_weights(batch)
        return cls(max(1.0, weights.sum().item()), max(1.0, weights[:, :-1].sum().item()), batch.ids.numel())


@dataclass(frozen=True)
class Drawn:
    """Tokens (B, T, K) drawn from the teacher's predictions, and their entropies (B, T) in nats."""

    tokens: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Signal:
    """What the teacher says to a batch: the stream (B, T, D) at the compared layers, and what ``head`` reads.

    Where it has been stored as ``drawn`` tokens, these are in the place of ``hidden``.
    """

    states: Sequence[Tensor]
    hidden: Tensor | None
    head: nn.Module
    drawn: Drawn | None = None


class Observed(nn.Module):
    """A model that tells its residual stream after each of ``layers``, in their order, and its final hidden states."""

    def __init__(self, model: PuzzleForCausalLM, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        decoder = self.model.model
        hidden, context = embed(decoder, batch, torch.float32), context_of(decoder, batch, torch.float32)
        seen = {EMBEDDING: hidden} if EMBEDDING in self.layers else {}
        for index, layer in enumerate(layers_of(self.model)):
            hidden = layer(hidden, position_embeddings=context.position, attention_mask=context.masks)
            if index in self.layers:
                seen[index] = hidden
        return [seen[index] for index in self.layers], decoder.norm(hidden)


class Objective(nn.Module):
    """The student, the map of its stream to the teacher's where the widths differ, and the parts of the loss."""

    def __init__(self, student: PuzzleForCausalLM, layers: Sequence[int], to_teacher: Tensor | None, config: KdConfig):
        super().__init__()
        self.student = Observed(student, layers)
        self.to_teacher = None if to_teacher is None else nn.Parameter(to_teacher)  # (D of the teacher, D)
        self.config = config

    def forward(self, batch: Batch, signal: Signal | None, counts: Counts) -> dict[str, Tensor]:
        """This batch's share of each part of the loss, by name, without its weight."""
        config, model = self.config, self.student.model
        states, hidden = self.student(batch)
        weights = prediction_weights(batch)
        found: dict[str, Tensor] = {}
        if config.kl_weight:
            assert signal is not None
            found["kl"] = self._divergence(hidden, signal, weights) / counts.predictions
        if config.lm_weight:
            labels = batch.ids[:, 1:], weights[:, :-1]
            found["lm"] = cross_entropy_sum(hidden[:, :-1], model.lm_head, *labels) / counts.labels
        if config.compares_layers:
            assert signal is not None
            cosines, errors = zip(*map(self._distances, states, signal.states), strict=True)
            if config.cosine_weight:
                found["cosine"] = torch.stack(cosines).sum() / counts.tokens
            if config.mse_weight:
                found["mse"] = torch.stack(errors).sum() / counts.tokens
        return found

    def _divergence(self, hidden: Tensor, signal: Signal, weights: Tensor) -> Tensor:
        """Summed over the predictions that count."""
        head, config = self.student.model.lm_head, self.config
        if signal.drawn is not None:
            drawn = signal.drawn
            return sampled_kl_sum(hidden, head, drawn.tokens, drawn.entropy, weights, config.temperature)
        assert signal.hidden is not None
        heads = (head, signal.head)
        return divergence_sum(hidden, signal.hidden, heads, weights, config.divergence, config.temperature)

    def _distances(self, own: Tensor, teachers: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cos and the relative squared error, each summed over the tokens."""
        own, teachers = own.float(), teachers.float()
        if self.to_teacher is not None:
            own = F.linear(own, self.to_teacher).float()
        cosine = 1 - F.cosine_similarity(own, teachers, dim=-1)
        if not self.config.mse_weight:
            return cosine.sum(), cosine.new_zeros(())
        error = (own - teachers).square().sum(-1) / teachers.square().sum(-1).clamp_min(torch.finfo().tiny)
        return cosine.sum(), error.sum()


def loss_of_logits(parts: Mapping[str, Tensor], config: KdConfig) -> Tensor:
    """The weighted loss of the predictions."""
    return _weighted(parts, {"kl": config.kl_weight, "lm": config.lm_weight})


def loss_of_layers(parts: Mapping[str, Tensor], config: KdConfig) -> Tensor:
    """The weighted loss of the residual stream."""
    return _weighted(parts, {"cosine": config.cosine_weight, "mse": config.mse_weight})


def _weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return sum((weights[name] * part for name, part in parts.items() if name in weights), torch.zeros(()))


def total_loss(parts: Mapping[str, Tensor], config: KdConfig, balance: float) -> Tensor:
    """The loss; ``balance`` is its α."""
    return loss_of_logits(parts, config) + balance * loss_of_layers(parts, config)


def fitted_map(own: Tensor, teachers: Tensor) -> Tensor:
    """(D of the teacher, D): the matrix that makes the teacher's embeddings (V, D of the teacher) of one's own (V, D),
    by least squares: what the map between the streams starts from.
    """
    own, teachers = own.float(), teachers.float()
    gram, cross = (own.T @ own).double(), (own.T @ teachers).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram, cross)
    return solved.T.float().contiguous()
