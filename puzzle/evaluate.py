"""What a model is worth on text nobody chose anything on: CE, bits per byte, KL and agreement with the teacher.

Means over tokens, standard errors over sequences. Reads models and the ``report`` sequences; writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.metrics import token_metrics
from puzzle.modeling import PuzzleForCausalLM
from puzzle.teacher import final_hidden


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, per_sequence: Tensor) -> Estimate:
        values = per_sequence.cpu().double()
        error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(values.mean().item(), error)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.standard_error * factor)


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
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: list[Tensor], bytes_per_token: float
) -> Quality:
    """Compares the student with the teacher on batches of ids (B, T)."""
    heads = (student.lm_head, teacher.lm_head)
    columns = [token_metrics(final_hidden(student, ids), final_hidden(teacher, ids), heads, ids) for ids in batches]
    ce = torch.cat([tokens.ce_nats.mean(1) for tokens in columns])
    teacher_ce = torch.cat([tokens.teacher_ce_nats.mean(1) for tokens in columns])
    return Quality(
        ce_nats=Estimate.of(ce),
        bits_per_byte=Estimate.of(ce).scaled(1 / math.log(2) / bytes_per_token),
        kl_nats=Estimate.of(torch.cat([tokens.kl_nats.mean(1) for tokens in columns])),
        ce_gap_nats=Estimate.of(ce - teacher_ce),
        agreement=Estimate.of(torch.cat([tokens.agreement.mean(1) for tokens in columns])),
    )
