"""What the true KL of an architecture may be, from others that were evaluated: a Gaussian process. Pure, numpy.

Reads what each site of an architecture costs by its score, and true values; computes predictions with their errors:

    log(KL / S) = m + g(v)      v: the scores of the sites (nats), S: their sum, S' the mean S of what was evaluated
    g ~ GP(0, s^2 (exp(-|v - w|^2 / (L S')^2) + r [v is w]))      m: the mean of what was evaluated

so that architectures which lose alike at the same places are wrong alike by their sums. L and r are those of highest
posterior density among :data:`LENGTHS` and :data:`NOISES`; s^2 has an inverse gamma prior and is integrated out there
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, eqs. 2.25, 2.26 and 5.8, with Student's density
in the place of the normal one: Shah et al., arXiv 1402.4306). As |v - w|^2 is a sum over sites, the kernel is a product
over them, and all pairs of moves at different sites are valued by one product of matrices (:meth:`Surrogate.of_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from puzzle.scoring.design import Floats

LENGTHS = 2.0 ** np.arange(-3, 4.25, 0.5)  # of the mean sum
NOISES = 10.0 ** np.arange(-4, 1.25, 0.5)  # of the variance s^2
MOST_LOG_RATIO = 20.0  # far beyond what is measured; keeps extrapolations numbers
LENGTH_PRIOR = (1.0, 2.0)  # median, and standard deviation of the natural logarithm
NOISE_PRIOR = (0.05, 3.0)
SPREAD = 0.2  # s, as sums of scores are wrong by (benchmarks/LOG.md, additivity)
SPREAD_WEIGHT = 4.0  # values that this counts as: those that are alike say little of those that are not
MOST_EXPONENT = 300.0  # keeps products of two exponentials numbers; what is so far away adds nothing
LEAST_SHARE = 1e-6  # of the mean sum, that a sum counts as at least: it is divided by


@dataclass(frozen=True, eq=False)
class Surrogate:
    """``known`` (N, sites) in units of L S', ``unit``; ``weights`` (N,) are K^-1 (y - m) without s^2, ``variance``;
    ``noise`` is r, ``least`` (nats) what a sum counts as at least. Made by :meth:`fitted`."""

    known: Floats
    weights: Floats
    mean: float
    variance: float
    noise: float
    unit: float
    least: float

    @classmethod
    def fitted(cls, scores: Floats, true: Floats) -> Surrogate:
        """``scores`` (N, sites) in nats, ``true`` (N,) KL in nats, above 0; N of 2 at least."""
        sums = scores.sum(1)
        scale = float(sums.mean()) or 1.0
        least = LEAST_SHARE * scale
        ratios = np.log(true / np.maximum(sums, least))
        mean = float(ratios.mean())
        rest = ratios - mean
        apart = _apart(scores, scores) / scale**2
        found = []
        for length in LENGTHS:
            values, vectors = np.linalg.eigh(np.exp(-apart / length**2))
            squares = np.square(vectors.T @ rest)
            for noise in NOISES:
                spectrum = np.maximum(values, 0.0) + noise
                variance = _variance(float((squares / spectrum).sum()), len(rest))
                density = -0.5 * ((len(rest) + SPREAD_WEIGHT) * np.log(variance) + np.log(spectrum).sum())
                found.append((density + _prior(length, LENGTH_PRIOR) + _prior(noise, NOISE_PRIOR), length, noise))
        _, length, noise = max(found)
        weights = np.linalg.solve(np.exp(-apart / length**2) + noise * np.eye(len(rest)), rest)
        variance, unit = _variance(float(rest @ weights), len(rest)), float(length * scale)
        return cls(scores / unit, weights, mean, variance, float(noise), unit, least)

    def with_predicted(self, scores: Floats) -> Surrogate:
        """As if what it predicts for these (M, sites) had been seen: no prediction changes, their errors do."""
        known = np.concatenate([self.known, scores / self.unit])
        return replace(self, known=known, weights=np.concatenate([self.weights, np.zeros(len(scores))]))

    def predict(self, scores: Floats) -> tuple[Floats, Floats]:
        """KL (nats) and the standard errors of its logarithm, (M,) each, of others than ``known``; from (M, sites)."""
        near = np.exp(-_apart(scores / self.unit, self.known))
        spread = np.maximum(1 - ((near @ self._inverse) * near).sum(1), 0.0) + self.noise
        return self._kl(scores.sum(1), near @ self.weights), np.sqrt(self.variance * spread)

    def of_pairs(self, start: Floats, first: Floats, second: Floats) -> Floats:
        """KL (nats), (M, K): of ``start`` (sites,) with what each of ``first`` (M, sites) and each of ``second`` (K,
        sites) adds to it; of use where these are 0 at one another's sites."""
        own = np.minimum(_apart(start[None] / self.unit, self.known) / 2, MOST_EXPONENT)
        one, two = (np.exp(own - _apart((start + moves) / self.unit, self.known)) for moves in (first, second))
        sums = start.sum() + first.sum(1)[:, None] + second.sum(1)
        return self._kl(sums, (one * self.weights) @ two.T)

    @cached_property
    def _inverse(self) -> Floats:
        """(N, N): K^-1, without s^2."""
        own = np.exp(-_apart(self.known, self.known)) + self.noise * np.eye(len(self.known))
        return np.asarray(np.linalg.inv(own), np.float64)

    def _kl(self, sums: Floats, rest: Floats) -> Floats:
        return np.maximum(sums, self.least) * np.exp(np.clip(self.mean + rest, -MOST_LOG_RATIO, MOST_LOG_RATIO))


def _apart(one: Floats, other: Floats) -> Floats:
    """(M, N): squared distances of (M, sites) and (N, sites)."""
    squares: Floats = np.square(one).sum(1)[:, None] + np.square(other).sum(1) - 2 * one @ other.T
    return np.maximum(squares, 0.0)


def _variance(squares: float, count: int) -> float:
    """Of s^2, after ``count`` values whose squares, each in its own variance without s^2, sum to ``squares``."""
    return (squares + SPREAD_WEIGHT * SPREAD**2) / (count + SPREAD_WEIGHT)


def _prior(value: float, prior: tuple[float, float]) -> float:
    median, spread = prior
    return -0.5 * float(np.log(value / median) / spread) ** 2
