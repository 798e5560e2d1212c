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

CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class TokenMetrics:
    """Per predicted token: KL(teacher ‖ student), cross-entropy of both, whether the top-1 agree. All (B, T-1) fp32."""

    kl_nats: Tensor
    ce_nats: Tensor
    teacher_ce_nats: Tensor
    agreement: Tensor


def token_metrics(
    student_hidden: Tensor, teacher_hidden: Tensor, heads: tuple[nn.Module, nn.Module], ids: Tensor
) -> TokenMetrics:
    """Compares two (B, T, D) final hidden states under their ``heads`` (student's, teacher's); ``ids`` is (B, T)."""
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


def kl_loss(student_hidden: Tensor, teacher_hidden: Tensor, heads: tuple[nn.Module, nn.Module]) -> Tensor:
    """Mean KL(teacher ‖ student) per token, with gradients to the student; logits are recomputed going backward."""
    student, teacher = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)  # (N, D)

    def chunk_sum(student_part: Tensor, teacher_part: Tensor) -> Tensor:
        log_q = F.log_softmax(heads[0](student_part).float(), -1)
        with torch.no_grad():
            log_p = F.log_softmax(heads[1](teacher_part).float(), -1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(chunk_sum, student[part], teacher[part], use_reentrant=False)
    return total / len(student)
