"""How many sequences, and draws of labels, scores need. Pure arithmetic.

Sequences are added until variants that compete are told apart, or cannot be.

Two variants met the same sequences, so what counts is the difference in each of them, whose spread is far below that of
either score. Told apart: the mean difference is at least two of its standard errors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from puzzle.memory_plan import MOST_DRAWS
from puzzle.types import mean_and_error

SURE = 2.0  # standard errors
RELATIVE_ERROR = 0.1  # of a one-pass score, that the draws are to reach


def num_draws(num_sequences: int) -> int:
    """Draws of labels per sequence that bring the relative error of a score to 10 %; at least one, at most 16.

    A draw's value is the square of a sum over many tokens, hence of a normal: its relative variance is 2. Measured, it
    is (benchmarks/LOG.md), so a first pass could not tell more than the number of sequences does.
    """
    return max(1, min(MOST_DRAWS, math.ceil(2 / RELATIVE_ERROR**2 / num_sequences)))


def rounds(first: int, available: int) -> Iterator[range]:
    """Which sequences each round adds: ``first``, then as many again as there were, up to ``available``."""
    start, stop = 0, min(first, available)
    while start < stop:
        yield range(start, stop)
        start, stop = stop, min(2 * stop, available)


def undecided(scores: Mapping[str, Sequence[float]], until_se: float) -> list[tuple[str, str]]:
    """Pairs of variants, or of a variant and the teacher (``""``, 0 throughout), that more sequences may tell apart.

    ``scores`` are per sequence, the same ones for all. A pair is left alone once the standard error of its mean
    difference is at most ``until_se``.
    """
    length = len(next(iter(scores.values()), ()))
    values = {"": [0.0] * length, **scores}
    return [
        (a, b)
        for a, b in itertools.combinations(values, 2)
        if _open([one - other for one, other in zip(values[a], values[b], strict=True)], until_se)
    ]


def may_reach(values: Sequence[float], limit: float) -> bool:
    """Whether the mean that a score's values per sequence stand for may be ``limit`` or more; so too for no numbers."""
    mean, error = mean_and_error(values)
    return not mean + SURE * error < limit


def _open(differences: Sequence[float], until_se: float) -> bool:
    mean, error = mean_and_error(differences)
    return error > until_se and abs(mean) < SURE * error
