"""What a model is worth on text nobody chose anything on: CE, bits per byte, KL and agreement with the teacher.

Means over tokens, standard errors over sequences. Reads models and the ``report`` sequences; writes nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.data.batches import Batch
from puzzle.metrics import TokenMetrics, sequence_means, token_metrics, tokens_in_sight
from puzzle.modeling import PuzzleForCausalLM
from puzzle.teacher import final_hidden
from puzzle.types import mean_and_error

FIRST_EDGE = 16  # below, one bucket holds all


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
    positions: tuple[AtPosition, ...]


@dataclass(frozen=True)
class AtPosition:
    """Of tokens with ``first`` to ``last`` tokens in sight of their prediction."""

    first: int
    last: int
    ce_nats: Estimate
    teacher_ce_nats: Estimate
    kl_nats: Estimate


@dataclass(frozen=True)
class Comparison:
    """Two models on the same sequences, each (N,) fp64: means over the tokens that count."""

    ce_nats: Tensor
    teacher_ce_nats: Tensor
    kl_nats: Tensor
    agreement: Tensor


def compared(student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: Sequence[Batch]) -> Comparison:
    """The student beside the teacher, sequence by sequence."""
    return _compared(_token_metrics(student, teacher, batches), batches)


@torch.no_grad()
def _token_metrics(
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM, batches: Sequence[Batch]
) -> list[TokenMetrics]:
    heads = (student.lm_head, teacher.lm_head)
    return [token_metrics([final_hidden(student, one)], final_hidden(teacher, one), heads, one)[0] for one in batches]


def _compared(columns: Sequence[TokenMetrics], batches: Sequence[Batch]) -> Comparison:
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
    columns = _token_metrics(student, teacher, batches)
    found = _compared(columns, batches)
    return Quality(
        ce_nats=Estimate.of(found.ce_nats),
        bits_per_byte=Estimate.of(found.ce_nats / math.log(2) / bytes_per_token),
        kl_nats=Estimate.of(found.kl_nats),
        ce_gap_nats=Estimate.of(found.ce_nats - found.teacher_ce_nats),
        agreement=Estimate.of(found.agreement),
        positions=_at_positions(columns, batches),
    )


def _at_positions(columns: Sequence[TokenMetrics], batches: Sequence[Batch]) -> tuple[AtPosition, ...]:
    """By powers of two of the tokens in sight: what a window or a lost head costs shows where much is in sight.

    Over the sequences that have such tokens; left out where fewer than two have.
    """
    most = max(batch.ids.shape[1] for batch in batches) - 1
    edges = [1, *(FIRST_EDGE * 2**power for power in range((most // FIRST_EDGE).bit_length())), most + 1]
    rows = []
    for first, end in itertools.pairwise(edges):
        parts = [_within(batch, first, end) for batch in batches]
        found = _compared(columns, parts)
        there = torch.cat([_counts(part) for part in parts])
        if int(there.sum()) >= 2:
            each = (found.ce_nats, found.teacher_ce_nats, found.kl_nats)
            rows.append(AtPosition(first, end - 1, *(Estimate.of(values[there]) for values in each)))
    return tuple(rows)


def _within(batch: Batch, first: int, end: int) -> Batch:
    """The batch, of which only tokens count that are predicted from ``first`` to ``end`` - 1 tokens."""
    in_sight = tokens_in_sight(batch)
    chosen = torch.nn.functional.pad((in_sight >= first) & (in_sight < end), (1, 0))
    return Batch(batch.ids, chosen if batch.counted is None else chosen & batch.counted, batch.documents)


def _counts(batch: Batch) -> Tensor:
    """(B,) bool: whether any of a sequence's tokens does."""
    assert batch.counted is not None
    return batch.counted[:, 1:].any(1).cpu()
