"""Orders of channels against brute force, and refits from the Gram matrix against least squares on activations."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from puzzle.blocks import channels
from puzzle.blocks.channels import contribution_order, obs_order, refit_down


def ffn(
    num_channels: int, num_outputs: int = 5, num_tokens: int = 2000, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Activations (N, I) that hang together, and a down projection (D, I), in fp64."""
    generator = torch.Generator().manual_seed(num_channels)
    hidden = torch.randn(num_tokens, rank or num_channels, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank or num_channels, num_channels, generator=generator, dtype=torch.float64)
    activations = torch.relu(hidden @ mixing) * torch.rand(num_channels, generator=generator, dtype=torch.float64)
    return activations, torch.randn(num_outputs, num_channels, generator=generator, dtype=torch.float64)


def loss(activations: Tensor, down: Tensor, kept: Tensor) -> float:
    """What is lost of the output when only ``kept`` remain and the down projection is fitted as well as can be."""
    wanted = activations @ down.T
    fitted = torch.linalg.lstsq(activations[:, kept], wanted).solution
    return (activations[:, kept] @ fitted - wanted).square().sum().item()


def test_contribution_is_the_papers() -> None:
    activations, down = ffn(12)
    expected = activations.abs().mean(0) * down.norm(dim=0)
    order = contribution_order(activations.abs().sum(0), down)
    assert torch.equal(order, expected.argsort(descending=True))


def test_obs_drops_one_by_one_what_brute_force_would() -> None:
    activations, down = ffn(7)
    left, expected = list(range(7)), []
    while len(left) > 1:
        losses = [loss(activations, down, torch.tensor([c for c in left if c != one])) for one in left]
        expected.append(left.pop(losses.index(min(losses))))
    order = obs_order(activations.T @ activations, down, 0.0)
    assert order.flip(0).tolist() == [*expected, *left]


def test_obs_is_near_the_best_of_all_subsets() -> None:
    activations, down = ffn(10)
    kept = obs_order(activations.T @ activations, down, 1e-6)[:5]
    best = min(loss(activations, down, torch.tensor(some)) for some in combinations(range(10), 5))
    assert 0.999999 * best <= loss(activations, down, kept) < 1.05 * best


def test_a_channel_that_others_make_up_for_goes_first() -> None:
    activations, down = ffn(9)
    activations[:, 4] = activations[:, 1] + 0.5 * activations[:, 7]
    down[:, 4] = 100  # however much it contributes
    order = obs_order(activations.T @ activations, down, 1e-9)
    assert order[-1] in (1, 4, 7)
    assert loss(activations, down, order[:-1]) == pytest.approx(0, abs=1e-6)


def test_blocks_lose_little_against_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    activations, down = ffn(300, rank=60)
    gram = activations.T @ activations
    monkeypatch.setattr(channels, "BLOCK_FRACTION", 0.0)
    one_by_one = obs_order(gram, down, 1e-4)
    monkeypatch.setattr(channels, "BLOCK_FRACTION", 0.03)
    in_blocks = obs_order(gram, down, 1e-4)
    contributing = contribution_order(activations.abs().sum(0), down)
    assert sorted(in_blocks.tolist()) == list(range(300))
    assert not torch.equal(in_blocks, one_by_one)
    for width in (40, 100, 200):
        exact = loss(activations, down, one_by_one[:width])
        assert loss(activations, down, in_blocks[:width]) < 1.02 * exact
        assert exact < loss(activations, down, contributing[:width])


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_the_refit_is_that_on_the_activations_themselves(damping: float) -> None:
    activations, down = ffn(12)
    kept = torch.tensor([1, 2, 5, 6, 11])
    found = refit_down(activations.T @ activations, down, kept, damping)
    features = activations[:, kept]
    pull = (damping * features.square().sum(0)).sqrt().diag()
    rows, wanted = torch.cat([features, pull]), torch.cat([activations @ down.T, pull @ down[:, kept].T])
    assert torch.allclose(found, torch.linalg.lstsq(rows, wanted).solution.T, atol=1e-8)


def test_all_channels_kept_are_left_alone() -> None:
    activations, down = ffn(12)
    assert torch.allclose(refit_down(activations.T @ activations, down, torch.arange(12), 1e-2), down)
