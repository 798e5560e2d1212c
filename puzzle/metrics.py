"""Distances between the next-token distributions of two models, in chunks over tokens.

Reads final hidden states (after the last norm) and the head, so that full logits of teacher and student are never held
at once: ``(tokens, vocab)`` exists for one chunk only. Everything is computed in fp32, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puzzle.data.batches import Batch

CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class TokenMetrics:
    """Per predicted token: KL(teacher ‖ student), cross-entropy of both, whether the top-1 agree. All (B, T-1) fp32."""

    kl_nats: Tensor
    ce_nats: Tensor
    teacher_ce_nats: Tensor
    agreement: Tensor


def token_metrics(
    student_hidden: Tensor, teacher_hidden: Tensor, heads: tuple[nn.Module, nn.Module], batch: Batch
) -> TokenMetrics:
    """Compares two (B, T, D) final hidden states under their ``heads`` (student's, teacher's) on ``batch``."""
    ids = batch.ids
    student, teacher = student_hidden[:, :-1].flatten(0, 1), teacher_hidden[:, :-1].flatten(0, 1)  # (N, D)
    labels = ids[:, 1:].flatten()
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(labels), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        log_q = F.log_softmax(heads[0](student[part]).float(), -1)  # (n, V)
        log_p = F.log_softmax(heads[1](teacher[part]).float(), -1)
        columns.append(
            (
                (log_p.exp() * (log_p - log_q)).sum(-1),
                F.nll_loss(log_q, labels[part], reduction="none"),
                F.nll_loss(log_p, labels[part], reduction="none"),
                (log_q.argmax(-1) == log_p.argmax(-1)).float(),
            )
        )
    shape = (ids.shape[0], ids.shape[1] - 1)
    return TokenMetrics(*(torch.cat(column).view(shape) for column in zip(*columns, strict=True)))


def sequence_means(values: Tensor, batch: Batch) -> Tensor:
    """(B,) fp64 on the CPU: means of (B, T-1) values per predicted token over those that count; 0 where none does."""
    counted = torch.ones_like(values) if batch.counted is None else batch.counted[:, 1:].to(values.dtype)
    return (values * counted).cpu().double().sum(1) / counted.cpu().double().sum(1).clamp_min(1)


def prediction_weights(batch: Batch) -> Tensor:
    """(B, T) fp32: 1 at positions whose next token counts; the last one's is not in the batch and counts as it does."""
    if batch.counted is None:
        return torch.ones(batch.ids.shape, device=batch.ids.device)
    return torch.cat([batch.counted[:, 1:], batch.counted[:, -1:]], 1).float()


def kl_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, heads: tuple[nn.Module, nn.Module], weights: Tensor
) -> Tensor:
    """Mean KL(teacher ‖ student) over positions by ``weights`` (B, T), with gradients to the student.

    Logits are recomputed going backward.
    """
    student, teacher = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)  # (N, D)
    each_weight = weights.flatten()

    def chunk_sum(student_part: Tensor, teacher_part: Tensor, weight: Tensor) -> Tensor:
        log_q = F.log_softmax(heads[0](student_part).float(), -1)
        with torch.no_grad():
            log_p = F.log_softmax(heads[1](teacher_part).float(), -1)
        return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * weight).sum()

    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(chunk_sum, student[part], teacher[part], each_weight[part], use_reentrant=False)
    return total / each_weight.sum().clamp_min(1)
