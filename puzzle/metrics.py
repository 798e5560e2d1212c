"""Distances between the next-token distributions of two models, in chunks over tokens.

Reads final hidden states (after the last norm) and the head, so that full logits of teacher and student are never held
at once: ``(tokens, vocab)`` exists for one chunk only. Everything is computed in fp32, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puzzle.data.batches import Batch
from puzzle.memory_plan import LOGIT_TOKENS


@dataclass(frozen=True)
class TokenMetrics:
    """Per predicted token: KL(teacher ‖ student), cross-entropy of both, whether the top-1 agree, and the distance
    1 - cos of the final hidden states (0 to 2), NaN where their sizes differ. All (B, T-1) fp32.
    """

    kl_nats: Tensor
    ce_nats: Tensor
    teacher_ce_nats: Tensor
    agreement: Tensor
    hidden_distance: Tensor


def token_metrics(
    students: Sequence[Tensor], teacher_hidden: Tensor, heads: tuple[nn.Module, nn.Module], batch: Batch
) -> list[TokenMetrics]:
    """Compares each student's (B, T, D) final hidden states with the teacher's under ``heads`` (students', teacher's).

    What depends on the teacher alone is computed once for all students.
    """
    hidden = [of[:, :-1].flatten(0, 1) for of in (teacher_hidden, *students)]  # (N, D)
    labels = batch.ids[:, 1:].flatten().unsqueeze(1)  # (N, 1)
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in students]
    for start in range(0, len(labels), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        log_p = F.log_softmax(heads[1](hidden[0][part]).float(), -1)  # (n, V)
        p, teacher_ce, top = log_p.exp(), -log_p.gather(1, labels[part]).squeeze(1), log_p.argmax(-1)
        negative_entropy = torch.linalg.vecdot(p, log_p)
        for found, own in zip(columns, hidden[1:], strict=True):
            log_q = F.log_softmax(heads[0](own[part]).float(), -1)
            found.append(
                (
                    negative_entropy - torch.linalg.vecdot(p, log_q),
                    -log_q.gather(1, labels[part]).squeeze(1),
                    teacher_ce,
                    (log_q.argmax(-1) == top).float(),
                    _distance(own[part], hidden[0][part]),
                )
            )
    shape = (batch.ids.shape[0], batch.ids.shape[1] - 1)
    return [TokenMetrics(*(torch.cat(one).view(shape) for one in zip(*found, strict=True))) for found in columns]


def _distance(own: Tensor, other: Tensor) -> Tensor:
    if own.shape != other.shape:
        return torch.full_like(own[:, 0], torch.nan, dtype=torch.float32)
    return 1 - F.cosine_similarity(own.float(), other.float(), dim=-1)


def sequence_means(values: Tensor, batch: Batch) -> Tensor:
    """(B,) fp64 on the CPU: means of (B, T-1) values per predicted token over those that count; 0 where none does."""
    counted = torch.ones_like(values) if batch.counted is None else batch.counted[:, 1:].to(values.dtype)
    return (values * counted).cpu().double().sum(1) / counted.cpu().double().sum(1).clamp_min(1)


def tokens_in_sight(batch: Batch) -> Tensor:
    """(B, T-1): how many tokens the prediction of each but the first may look at; within its document, if given."""
    length = batch.ids.shape[1] - 1
    places = torch.arange(length, device=batch.ids.device).expand(len(batch), length)
    if batch.documents is None:
        return places + 1
    before = batch.documents[:, :-1].contiguous()
    return places + 1 - torch.searchsorted(before, before)


def prediction_weights(batch: Batch) -> Tensor:
    """(B, T) fp32: 1 at positions whose next token counts; the last one's is not in the batch and counts as it does."""
    if batch.counted is None:
        return torch.ones(batch.ids.shape, device=batch.ids.device)
    return torch.cat([batch.counted[:, 1:], batch.counted[:, -1:]], 1).float()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, middle) + _kl(log_q, middle)) / 2


# Of two distributions in logarithms (n, V), the teacher's first: (n,) in nats.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": _kl,
    "reverse": lambda log_p, log_q: _kl(log_q, log_p),
    "jsd": _jensen_shannon,
}


def divergence_sum(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    heads: tuple[nn.Module, nn.Module],
    weights: Tensor,
    kind: str = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Divergence summed over positions by ``weights`` (B, T), with gradients to the student; nats.

    Both models' logits are divided by the temperature, and the loss is multiplied by its square, so that gradients keep
    their size (Hinton et al., 1503.02531). Logits are recomputed going backward.
    """

    def chunk_sum(student_part: Tensor, teacher_part: Tensor, weight: Tensor) -> Tensor:
        log_q = F.log_softmax(heads[0](student_part).float() / temperature, -1)
        with torch.no_grad():
            log_p = F.log_softmax(heads[1](teacher_part).float() / temperature, -1)
        return (DIVERGENCES[kind](log_p, log_q) * weight).sum() * temperature**2

    return _sum_of_chunks(chunk_sum, student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), weights.flatten())


def divergence_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    heads: tuple[nn.Module, nn.Module],
    weights: Tensor,
    kind: str = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """The mean of :func:`divergence_sum` over what ``weights`` count."""
    total = divergence_sum(student_hidden, teacher_hidden, heads, weights, kind, temperature)
    return total / weights.sum().clamp_min(1)


def cross_entropy_sum(hidden: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of ``labels`` (B, T), summed by ``weights`` (B, T), with gradients; nats. In the same chunks."""

    def chunk_sum(part: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(head(part).float(), label, reduction="none") * weight).sum()

    return _sum_of_chunks(chunk_sum, hidden.flatten(0, 1), labels.flatten(), weights.flatten())


def sampled_kl_sum(
    hidden: Tensor, head: nn.Module, tokens: Tensor, entropy: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """An estimate of the forward :func:`divergence_sum` from tokens (B, T, K) drawn from the teacher's predictions.

    Their ``entropy`` is (B, T). Its expectation, and that of its gradient, are the divergence's.
    """

    def chunk_sum(part: Tensor, drawn: Tensor, own_entropy: Tensor, weight: Tensor) -> Tensor:
        log_q = F.log_softmax(head(part).float() / temperature, -1)
        each = -log_q.gather(1, drawn.long()).mean(1) - own_entropy
        return (each * weight).sum() * temperature**2

    rows = hidden.flatten(0, 1), tokens.flatten(0, 1), entropy.flatten(), weights.flatten()
    return _sum_of_chunks(chunk_sum, *rows)


def _sum_of_chunks(chunk_sum: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Of ``chunk_sum`` over chunks of tokens, each recomputed going backward; ``rows`` have one row a token."""
    total = torch.zeros((), device=rows[0].device)
    for parts in zip(*(of.split(LOGIT_TOKENS) for of in rows), strict=True):
        total = total + checkpoint(chunk_sum, *parts, use_reentrant=False)
    return total
