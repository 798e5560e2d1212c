"""The surrogate against the textbook's formulas written out, and what follows from them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import multivariate_t, spearmanr

from puzzle.scoring.design import Floats
from puzzle.search.surrogate import (
    LENGTH_PRIOR,
    LENGTHS,
    NOISE_PRIOR,
    NOISES,
    SPREAD,
    SPREAD_WEIGHT,
    Surrogate,
)


def world(seed: int, count: int, sites: int = 6) -> tuple[Floats, Floats]:
    """Architectures of some sites whose KL strays from the sum of their scores by where these are."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 0.01, 0.05, 0.2], (count, sites)) * rng.uniform(0.5, 2.0, sites)
    scores[:, 0] += 0.01
    turn = np.random.default_rng(7).normal(size=(sites, 3))
    return scores, scores.sum(1) * np.exp(0.3 + np.sin(5 * scores @ turn).sum(1) / 3)


def kernel(one: Floats, other: Floats, length: float) -> Floats:
    found: Floats = np.exp(-np.square(one[:, None] - other).sum(2) / length**2)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_predictions_and_their_errors_are_those_of_the_likeliest_process(seed: int) -> None:
    scores, true = world(seed, 24)
    known, new = scores[:16], scores[16:]
    log_ratio = np.log(true[:16] / known.sum(1))
    mean, scale = log_ratio.mean(), known.sum(1).mean()
    best = (-np.inf, np.empty(0), np.empty(0))
    for length, noise in itertools.product(LENGTHS, NOISES):
        matrix = kernel(known, known, length * scale) + noise * np.eye(16)
        rest = log_ratio - mean
        weight = SPREAD_WEIGHT
        variance = (rest @ np.linalg.solve(matrix, rest) + weight * SPREAD**2) / (16 + weight)
        density = multivariate_t(np.full(16, mean), SPREAD**2 * matrix, weight).logpdf(log_ratio)
        for value, (median, spread) in ((length, LENGTH_PRIOR), (noise, NOISE_PRIOR)):
            density -= 0.5 * (np.log(value / median) / spread) ** 2
        if density > best[0]:
            near = kernel(new, known, length * scale)
            spread_of = variance * (1 + noise - (near * np.linalg.solve(matrix, near.T).T).sum(1))
            best = density, mean + near @ np.linalg.solve(matrix, rest), np.sqrt(np.maximum(spread_of, 0.0))
    means, errors = Surrogate.fitted(known, true[:16]).predict(new)
    np.testing.assert_allclose(means, new.sum(1) * np.exp(best[1]), rtol=1e-7)
    np.testing.assert_allclose(errors, best[2], rtol=1e-5, atol=1e-7)


def test_pairs_of_moves_are_valued_as_wholes() -> None:
    scores, true = world(0, 20)
    surrogate, start = Surrogate.fitted(scores, true), scores[3]
    first, second = np.zeros((2, 5, 6))
    first[:, :2] = np.random.default_rng(1).uniform(-0.01, 0.3, (5, 2))
    second[:, 4:] = np.random.default_rng(2).uniform(-0.01, 0.3, (5, 2))
    wholes = (start + first[:, None] + second).reshape(25, 6)
    np.testing.assert_allclose(
        surrogate.of_pairs(start, first, second).ravel(), surrogate.predict(wholes)[0], rtol=1e-9
    )


def test_moves_to_what_is_very_far_away_stay_numbers_that_mean_something() -> None:
    scores, true = world(0, 12)
    fitted = Surrogate.fitted(scores, true)
    surrogate = replace(fitted, known=scores / 1e-3, unit=1e-3)
    to_others = scores[:, None] - scores
    for start, moves in zip(scores, np.moveaxis(to_others, 1, 0), strict=True):
        sums = (start + moves).sum(1)
        rest = np.log(surrogate.of_pairs(start, np.zeros((1, 6)), moves)[0] / sums) - surrogate.mean
        assert (abs(rest) <= abs(surrogate.weights).sum()).all()


def test_what_was_evaluated_is_known_and_what_is_far_is_as_wrong_as_the_others() -> None:
    scores, true = world(1, 30)
    surrogate = Surrogate.fitted(scores, true)
    means, errors = surrogate.predict(scores)
    np.testing.assert_allclose(means, true, rtol=0.1)
    far = scores[:1] + 1000.0
    mean, error = (values[0] for values in surrogate.predict(far))
    assert mean == pytest.approx(far.sum() * np.exp(np.log(true / scores.sum(1)).mean()))
    assert error == pytest.approx(np.sqrt(surrogate.variance * (1 + surrogate.noise)))
    assert max(errors) < error


def test_what_counts_as_seen_changes_errors_as_if_it_were_and_no_prediction() -> None:
    scores, true = world(4, 24)
    surrogate = Surrogate.fitted(scores[:12], true[:12])
    (means, errors), told = surrogate.predict(scores), surrogate.with_predicted(scores[12:15])
    np.testing.assert_allclose(told.predict(scores)[0], means, rtol=1e-9)
    assert (told.predict(scores)[1] <= errors + 1e-9).all() and (told.predict(scores[12:15])[1] < errors[12:15]).all()
    seen = scores[:15] / surrogate.unit
    as_seen = kernel(seen, seen, 1.0) + told.noise * np.eye(15)
    near = kernel(scores[15:] / surrogate.unit, seen, 1.0)
    spread = told.variance * (1 + told.noise - (near * np.linalg.solve(as_seen, near.T).T).sum(1))
    np.testing.assert_allclose(told.predict(scores[15:])[1], np.sqrt(np.maximum(spread, 0.0)), rtol=1e-5, atol=1e-7)


def test_it_ranks_what_it_has_not_seen_far_better_than_sums() -> None:
    scores, true = world(2, 300)
    means, _ = Surrogate.fitted(scores[:100], true[:100]).predict(scores[100:])
    by_sums, by_surrogate = (spearmanr(values, true[100:])[0] for values in (scores[100:].sum(1), means))
    assert by_surrogate > by_sums + 0.05 and by_surrogate > 0.9, (by_sums, by_surrogate)


def test_values_that_are_alike_say_little_of_what_is_far_from_them() -> None:
    scores, true = world(5, 10)
    scores = scores[:1] * np.linspace(1.0, 1.01, 10)[:, None]
    surrogate = Surrogate.fitted(scores, 1.3 * scores.sum(1))
    far = surrogate.predict(scores[:1] + 1000.0)[1][0]
    spread = SPREAD * np.sqrt(SPREAD_WEIGHT / (10 + SPREAD_WEIGHT))
    assert far == pytest.approx(spread * np.sqrt(1 + surrogate.noise), rel=1e-3)


def test_units_do_not_matter() -> None:
    scores, true = world(3, 20)
    small, large = Surrogate.fitted(scores, true), Surrogate.fitted(1000 * scores, 1000 * true)
    (means, errors), (others, errors_of_others) = small.predict(scores), large.predict(1000 * scores)
    np.testing.assert_allclose(1000 * means, others, rtol=1e-6)
    np.testing.assert_allclose(errors, errors_of_others, rtol=1e-5, atol=1e-7)


def test_sums_of_nothing_and_values_that_are_all_alike_stay_numbers() -> None:
    some = np.zeros((9, 3))
    some[1:, 0] = 0.1
    for scores, true in itertools.product((some, np.zeros((9, 3))), (np.full(9, 0.1), np.linspace(0.1, 0.2, 9))):
        surrogate = Surrogate.fitted(scores, true)
        for values in (*surrogate.predict(scores), surrogate.of_pairs(scores[0], scores, scores)):
            assert np.isfinite(values).all()
