"""Moments against sums over raw activations, and their least squares against torch's on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puzzle.blocks.moments import Moments, NotFiniteError, cholesky, ridge, solve_shrunk, token_weights

CPU = torch.device("cpu")


def tokens(num_tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, 7) that are correlated and not centred, targets (N, 3), weights (N,) of which some are 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_tokens, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 0.5
    targets = torch.randn(num_tokens, 3, generator=generator)
    weights = torch.rand(num_tokens, generator=generator) * (torch.arange(num_tokens) % 4 > 0)
    return features, targets, weights


def moments_of(features: Tensor, targets: Tensor, weights: Tensor) -> Moments:
    found = Moments.zeros(features.shape[-1], targets.shape[-1], CPU)
    found.add(features, targets, weights)
    return found


def least_squares(features: Tensor, targets: Tensor, weights: Tensor, prior: Tensor, damping: float) -> Tensor:
    """The same problem as one tall system: a row per token and a row per feature that pulls towards the prior."""
    x, y, root = features.double(), targets.double(), weights.double().sqrt()[:, None]
    pull = (damping * (root * x).square().sum(0)).sqrt().diag()
    return torch.linalg.lstsq(torch.cat([root * x, pull]), torch.cat([root * y, pull @ prior.double().T])).solution.T


def test_moments_are_weighted_sums_whatever_the_batches() -> None:
    features, targets, weights = tokens()
    whole = moments_of(features, targets, weights)
    parts = Moments.zeros(7, 3, CPU)
    for rows in torch.arange(60).split(16):
        parts.add(features[rows].unsqueeze(0), targets[rows].unsqueeze(0), weights[rows].unsqueeze(0))
    expected = (features * weights[:, None]).double().T @ features.double()
    assert torch.allclose(whole.gram, expected, rtol=1e-5)
    assert torch.allclose(parts.gram, whole.gram, rtol=1e-5)
    assert torch.allclose(
        parts.cross, (features * weights[:, None]).double().T @ targets.double(), rtol=1e-4, atol=1e-5
    )
    assert whole.num_tokens == parts.num_tokens == 45


def test_a_token_of_weight_zero_leaves_no_trace() -> None:
    features, targets, weights = tokens()
    clean = moments_of(features, targets, weights)
    features[::4], targets[::4] = torch.inf, torch.nan
    assert torch.equal(moments_of(features, targets, weights).gram, clean.gram)
    assert torch.equal(moments_of(features, targets, weights).cross, clean.cross)


def test_autocast_does_not_reach_the_sums() -> None:
    given = tokens()
    expected = moments_of(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moments_of(*given)
    assert torch.equal(found.gram, expected.gram)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("prior_scale", [0.0, 1.0])
def test_the_solution_is_that_of_least_squares_on_the_tokens(damping: float, prior_scale: float) -> None:
    features, targets, weights = tokens()
    prior = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)) * prior_scale
    found = moments_of(features, targets, weights)
    solved = solve_shrunk(found.gram, found.cross, prior, damping)
    assert torch.allclose(solved, least_squares(features, targets, weights, prior, damping), atol=1e-5)


def test_fit_uses_the_ridge_for_its_size() -> None:
    found, prior = moments_of(*tokens()), torch.ones(3, 7)
    assert torch.equal(found.fit(prior), solve_shrunk(found.gram, found.cross, prior, ridge(7, 45)))
    assert torch.equal(found.fit(), solve_shrunk(found.gram, found.cross, torch.zeros(3, 7), 0.1 * ridge(7, 45)))
    assert ridge(7, 45) == pytest.approx(7 / 45)
    assert ridge(7, 450) < ridge(7, 45) < ridge(70, 45)


def test_without_evidence_the_prior_stays() -> None:
    prior = torch.arange(21.0).view(3, 7)
    assert torch.equal(Moments.zeros(7, 3, CPU).fit(prior), prior.double())
    features, targets, weights = tokens()
    features[:, 2] = 0  # a dead feature beside live ones
    assert torch.allclose(moments_of(features, targets, weights).fit(prior)[:, 2], prior[:, 2].double())


def test_equal_features_are_no_obstacle() -> None:
    features, targets, weights = tokens()
    features[:, 3] = features[:, 5]
    found = moments_of(features, targets, weights)
    solved = solve_shrunk(found.gram, found.cross, torch.zeros(3, 7), 0.0)
    assert torch.isfinite(solved).all()
    error = (weights[:, None] * (features @ solved.float().T - targets).square()).sum()
    best = least_squares(features[:, :5], targets, weights, torch.zeros(3, 5), 0.0).float()
    with_six = least_squares(features[:, [0, 1, 2, 3, 4, 6]], targets, weights, torch.zeros(3, 6), 0.0).float()
    expected = (weights[:, None] * (features[:, [0, 1, 2, 3, 4, 6]] @ with_six.T - targets).square()).sum()
    assert error == pytest.approx(expected.item(), rel=1e-3)
    assert error < (weights[:, None] * (features[:, :5] @ best.T - targets).square()).sum()


def test_moments_of_what_is_not_finite_are_refused() -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        cholesky(torch.full((3, 3), torch.nan, dtype=torch.float64))
    moments_of(*tokens()).check_finite()
    for bad in (torch.nan, torch.inf):
        features, targets, weights = tokens()
        features[2, 4] = bad
        with pytest.raises(NotFiniteError):
            moments_of(features, targets, weights).check_finite()
        features, targets, weights = tokens()
        targets[2, 1] = bad
        with pytest.raises(NotFiniteError):
            moments_of(features, targets, weights).check_finite()
    with pytest.raises(NotFiniteError):
        moments_of(features, targets, token_weights(torch.full((4, 15, 2), torch.nan)).flatten()).check_finite()


def test_the_first_position_and_massive_tokens_do_not_count() -> None:
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    hidden[1, 5] *= 100
    weights = token_weights(hidden)
    expected = torch.ones(2, 9)
    expected[:, 0] = expected[1, 5] = 0
    assert torch.equal(weights, expected)
