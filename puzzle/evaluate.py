"""What a model is worth on text nobody chose anything on: CE, bits per byte, KL and agreement with the teacher.

Means over tokens, standard errors over sequences. Reads models and the ``report`` sequences; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Comparison:
    """Two models on the same sequences, each (N,) fp64: means over the tokens that count."""

    ce_nats: Tensor
    teacher_ce_nats: Tensor
    kl_nats: Tensor
    agreement: Tensor


@torch.no_grad()
def compared(student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: Sequence[Batch]) -> Comparison:
    """The student beside the teacher, sequence by sequence."""
    heads = (student.lm_head, teacher.lm_head)
    columns = [
        token_metrics([final_hidden(student, one)], final_hidden(teacher, one), heads, one)[0] for one in batches
    ]

    def means(of_tokens: Callable[[TokenMetrics], Tensor]) -> Tensor:
        pairs = zip(columns, batches, strict=True)
        return torch.cat([sequence_means(of_tokens(tokens), batch) for tokens, batch in pairs])

    return Comparison(
        means(lambda tokens: tokens.ce_nats),
        means(lambda tokens: tokens.teacher_ce_nats),
        means(lambda tokens: tokens.kl_nats),
        means(lambda tokens: tokens.agreement),
    )


def evaluate(
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: Sequence[Batch], bytes_per_token: float
) -> Quality:
    """Compares the student with the teacher on ``batches``; where only some tokens count, on predicting those."""
    found = compared(student, teacher, batches)
    return Quality(
        ce_nats=Estimate.of(found.ce_nats),
        bits_per_byte=Estimate.of(found.ce_nats / math.log(2) / bytes_per_token),
        kl_nats=Estimate.of(found.kl_nats),
        ce_gap_nats=Estimate.of(found.ce_nats - found.teacher_ce_nats),
        agreement=Estimate.of(found.agreement),
    )
