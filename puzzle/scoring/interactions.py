"""The true KL of an architecture from the single scores of its items, learnt from true evaluations. Pure, no torch.

Reads single scores s_i and :class:`Evaluation` records; computes models by kind (:data:`KINDS`). With S = sum_i s_i,
additive kinds are what a search can take as it is; the others have a curve f of the sum, since large ones saturate:

    KL = S + sum_{i<j} 2 rho_ij sqrt(s_i s_j)
    KL = S exp(c f(log S) + sum_{i<j} 2 rho_ij sqrt(s_i s_j) / S)      c = 1 - sum_i s_i^2 / S^2

c is 0 for one item and nears 1 for many alike, so that every kind gives a single item its own score exactly. rho
belongs to pairs of sites. All coefficients come from one ridge regression towards 0, of KL / S - 1 or log(KL / S).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from puzzle.scoring.design import Design, Floats, Ints, Single
from puzzle.types import ConfigError, Interaction, Score, Site, Strict

# What has coefficients, from the simplest kind. line, bends: of the curve; pairs: a rho per pair of sites; means: from
# which rho deviates, per ordered pair of parts (attention before FFN ...) one constant and one fading with distance
KINDS: Mapping[str, tuple[str, ...]] = {
    "sum": (),
    "power": ("line",),
    "curve": ("line", "bends"),
    "interactions": ("pairs",),
    "local": ("pairs", "means"),
    "interactions-of-power": ("line", "pairs"),
    "local-of-curve": ("line", "bends", "pairs", "means"),
}
ADDITIVE = tuple(kind for kind, columns in KINDS.items() if "line" not in columns)
RIDGES = 10.0 ** np.arange(3, -2.25, -0.5)  # from the strongest, which wins a tie
TUNING_FOLDS = 5
MOST_LOG_RATIO = 20.0  # far beyond what is measured; keeps extrapolations numbers
LEAST_RATIO = 0.05  # of the sum: an additive kind's interactions never take a prediction below it


@dataclass(frozen=True)
class Evaluation(Strict):
    """An architecture's measured KL. ``items`` are those that change something: the teacher's own blocks left out."""

    items: tuple[str, ...]
    kl_nats: float
    standard_error: float

    def __post_init__(self) -> None:
        if not (self.items and 0 < self.kl_nats < np.inf and self.standard_error >= 0):
            named = " ".join(self.items) or "no items"
            raise ConfigError(f"{named}: {self.kl_nats} ± {self.standard_error} nats is no KL of a changed model")

    @classmethod
    def of(cls, items: Iterable[str], score: Score) -> Evaluation:
        """From the true score of the whole; of a single sequence the error is not known, and not counted."""
        return cls(tuple(items), score.mean, score.standard_error if len(score.per_sequence) > 1 else 0.0)


@dataclass(frozen=True)
class Estimate:
    """A predicted KL (nats); the error is that of coefficients and misfit, 0 for a single item."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Fit(Strict):
    """A model of all evaluations, and the quality of predictions for ``model.evaluations``, each held out.

    ``spread``: standard deviation of ``log_errors``, log(predicted / true); ``bias``: mean of predicted / true;
    ``coverage``: share of true values within two standard errors; ``measuring_error``: root mean square of the
    evaluations' own relative standard errors, for comparison.
    """

    model: InteractionModel
    spread: float
    bias: float
    spearman: float
    coverage: float
    measuring_error: float
    log_errors: tuple[float, ...] = field(repr=False)


def cross_validated(
    kind: str, evaluations: Iterable[Evaluation], singles: tuple[Single, ...], folds: int = 10, seed: int = 0
) -> Fit:
    """The model of all evaluations; its quality with each fold predicted, ridge and noise included, from the others.

    Evaluations of one item teach nothing and are dropped. ConfigError for fewer evaluations than folds,
    MissingMeasurementError for an item without a score.
    """
    several = [replace(one, items=tuple(sorted(one.items))) for one in evaluations if len(one.items) > 1]
    known = tuple(sorted(several, key=lambda one: (one.items, one.kl_nats)))
    if len(known) < max(folds, 2):
        few = f"{len(known)} evaluations of two or more items are too few for {folds} folds"
        raise ConfigError(f"{few}: evaluate at least {max(folds, 2)} architectures, or take fewer folds")
    model = InteractionModel(kind, 0.0, 0.0, singles, known)
    everything, (means, errors) = np.arange(len(known)), np.zeros((2, len(known)))
    for train, test in _splits(everything, folds, seed):
        ridge, noise = model._tuned(train, seed)
        value, leverage = model._held_out(train, test, ridge)
        means[test], errors[test] = model._estimates(model._rows[0][test], value, noise * (1 + leverage))
    ridge, noise = model._tuned(everything, seed)
    true = np.array([one.kl_nats for one in known])
    measured = np.array([one.standard_error for one in known]) / true
    return Fit(
        model=replace(model, ridge=ridge, noise=noise),
        spread=float(np.log(means / true).std()),
        bias=float(np.mean(means / true)),
        spearman=spearman(means, true),
        coverage=float(np.mean(abs(means - true) <= 2 * errors)),
        measuring_error=float(np.sqrt(np.mean(measured**2))),
        log_errors=tuple(np.log(means / true).tolist()),
    )


def best_of(fits: Sequence[Fit]) -> Fit:
    """The first, so the simplest, whose spread exceeds the least by no more than the difference's standard error.

    The fits are of the same evaluations, folds and seed; compared are squared log errors about their kind's mean.
    """
    squares = [np.square(np.array(fit.log_errors) - np.mean(fit.log_errors)) for fit in fits]
    losses = [own - min(squares, key=lambda one: float(one.mean())) for own in squares]
    good = [loss.mean() <= loss.std(ddof=1) / np.sqrt(len(loss)) for loss in losses]
    return fits[good.index(True)]


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation, equal values sharing their mean rank; 0 where either does not vary."""
    ranks = []
    for values in (first, second):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place] - (len(values) + 1) / 2)
    norm = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())
    return float(ranks[0] @ ranks[1] / norm) if norm > 0 else 0.0


def _splits(rows: Ints, folds: int, seed: int) -> list[tuple[Ints, Ints]]:
    """``rows`` without each of ``folds`` random parts, and that part."""
    order = np.random.default_rng(seed).permutation(rows)
    return [(np.setdiff1d(rows, order[fold::folds]), order[fold::folds]) for fold in range(folds)]


def _ridge(gram: Floats, targets: Floats, cross: Floats, prior: Floats, ridge: float) -> tuple[Floats, Floats]:
    """In its dual form, as pairs of sites outnumber evaluations: predicted targets (N,), and variances in noises (N,).

    ``gram``, ``cross`` (N, known), ``prior`` (N,): scalar products of known rows, of rows with them, with themselves.
    """
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), cross.T).T
    return weights @ targets, np.maximum(prior - (weights * cross).sum(1), 0.0) / ridge


@dataclass(frozen=True)
class InteractionModel(Strict):
    """One kind with its data, the ridge's strength, and the ``noise``: the variance of what no coefficient explains.

    That is what ``to_json`` stores; the coefficients follow from it. Made by :func:`cross_validated`.
    """

    kind: str
    ridge: float
    noise: float
    singles: tuple[Single, ...] = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind of model {self.kind!r}; allowed: {', '.join(KINDS)}")

    def predict(self, items: Sequence[str]) -> Estimate:
        """Of an architecture, its unchanged sites left out; MissingMeasurementError for an item without a score."""
        means, errors = self.predict_many([items])
        return Estimate(float(means[0]), float(errors[0]))

    def predict_many(self, architectures: Sequence[Sequence[str]]) -> tuple[Floats, Floats]:
        """KL (nats) and standard errors of N architectures, (N,) each; needs N * sites^2 / 2 numbers of memory."""
        sums, columns = self.design.rows(architectures)
        products = columns @ self._rows[1].T, np.square(columns).sum(1)
        value, leverage = _ridge(self._gram, self._targets, *products, self.ridge)
        several = np.array([len(items) > 1 for items in architectures])
        return self._estimates(sums, value, self.noise * (several + leverage))

    def interactions(self, pairs: Sequence[tuple[str, str]]) -> tuple[Interaction, ...]:
        """What pairs of items that share no site cost together beyond their scores; ConfigError unless additive."""
        if self.kind not in ADDITIVE:
            raise ConfigError(f"{self.kind} is no sum over pairs of items; kinds that are: {', '.join(ADDITIVE)}")
        amplitudes = self.design.amplitudes[[self.design.place(item_id) for pair in pairs for item_id in pair]]
        values = 2 * ((amplitudes[::2] @ self.rho) * amplitudes[1::2]).sum(1)
        return tuple(Interaction(*pair, float(value)) for pair, value in zip(pairs, values, strict=True))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those that items cover, in the order in which the residual stream meets them."""
        return self.design.sites

    @cached_property
    def rho(self) -> Floats:
        """(sites, sites), symmetric; zero on the diagonal and for kinds without pairs."""
        return self.design.rho(self._coefficients)

    @cached_property
    def _coefficients(self) -> Floats:
        return self._rows[1].T @ np.linalg.solve(self._gram + self.ridge * np.eye(len(self._gram)), self._targets)

    @cached_property
    def design(self) -> Design:
        return Design.of(KINDS[self.kind], self.singles, [one.items for one in self.evaluations])

    @cached_property
    def _rows(self) -> tuple[Floats, Floats]:
        return self.design.rows([one.items for one in self.evaluations])

    @cached_property
    def _gram(self) -> Floats:
        return self._rows[1] @ self._rows[1].T

    @cached_property
    def _targets(self) -> Floats:
        ratio = np.array([one.kl_nats for one in self.evaluations]) / self._rows[0]
        return ratio - 1 if self.kind in ADDITIVE else np.log(ratio)

    def _log_ratio(self, value: Floats) -> Floats:
        """log(KL / S) from what the regression predicts."""
        additive = self.kind in ADDITIVE
        return (
            np.log(np.maximum(1 + value, LEAST_RATIO)) if additive else np.clip(value, -MOST_LOG_RATIO, MOST_LOG_RATIO)
        )

    def _estimates(self, sums: Floats, value: Floats, variance: Floats) -> tuple[Floats, Floats]:
        means = sums * np.exp(self._log_ratio(value))
        return means, np.sqrt(variance) * (sums if self.kind in ADDITIVE else means)

    def _held_out(self, train: Ints, test: Ints, ridge: float) -> tuple[Floats, Floats]:
        products = self._gram[np.ix_(test, train)], self._gram.diagonal()[test]
        return _ridge(self._gram[np.ix_(train, train)], self._targets[train], *products, ridge)

    def _tuned(self, rows: Ints, seed: int) -> tuple[float, float]:
        """The ridge with the least cross-validated squared log error among ``rows``, and the noise at that ridge."""
        found = []
        value, leverage = np.zeros((2, len(self._targets)))
        for ridge in RIDGES:
            for train, test in _splits(rows, min(TUNING_FOLDS, len(rows)), seed):
                value[test], leverage[test] = self._held_out(train, test, ridge)
            loss = np.square(self._log_ratio(value) - self._log_ratio(self._targets))[rows].mean()
            noise = (np.square(value - self._targets) / (1 + leverage))[rows].mean()
            found.append((float(loss), float(ridge), float(noise)))
        return min(found, key=lambda one: one[0])[1:]
