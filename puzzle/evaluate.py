"""What a model is worth on text nobody chose anything on: CE, bits per byte, KL and agreement with the teacher.

Means over tokens, standard errors over sequences. Reads models and the ``report`` sequences; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.data.batches import Batch
from puzzle.metrics import TokenMetrics, sequence_means, token_metrics
from puzzle.modeling import PuzzleForCausalLM
from puzzle.teacher import final_hidden
from puzzle.types import mean_and_error


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, per_sequence: Tensor) -> Estimate:
        return cls(*mean_and_error(per_sequence.tolist()))


@dataclass(frozen=True)
class Quality:
    """``ce_gap_nats`` is the student's CE minus the teacher's, paired over sequences."""

    ce_nats: Estimate
    bits_per_byte: Estimate
    kl_nats: Estimate
    ce_gap_nats: Estimate
    agreement: Estimate


@torch.no_grad()
def evaluate(
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: list[Batch], bytes_per_token: float
) -> Quality:
    """Compares the student with the teacher on ``batches``; where only some tokens count, on predicting those."""
    heads = (student.lm_head, teacher.lm_head)
    columns = [
        token_metrics([final_hidden(student, one)], final_hidden(teacher, one), heads, one)[0] for one in batches
    ]

    def means(of_tokens: Callable[[TokenMetrics], Tensor]) -> Tensor:
        pairs = zip(columns, batches, strict=True)
        return torch.cat([sequence_means(of_tokens(tokens), batch) for tokens, batch in pairs])

    ce, teacher_ce = means(lambda tokens: tokens.ce_nats), means(lambda tokens: tokens.teacher_ce_nats)
    return Quality(
        ce_nats=Estimate.of(ce),
        bits_per_byte=Estimate.of(ce / math.log(2) / bytes_per_token),
        kl_nats=Estimate.of(means(lambda tokens: tokens.kl_nats)),
        ce_gap_nats=Estimate.of(ce - teacher_ce),
        agreement=Estimate.of(means(lambda tokens: tokens.agreement)),
    )
