"""Linear channels in a gated FFN that is run as it is, against least squares on its activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocks.channels import GatedMoments, MixedChannels, best_mixture, mixed_channels, obs_order

SIZE, WIDTH = 6, 20


class Gated:
    """A gated FFN with its inputs; with ``slope`` its gates are far in their linear range for most tokens."""

    def __init__(self, has_bias: bool, slope: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        self.inputs = random(3000, SIZE)
        if not has_bias:
            self.inputs[:, 0] = 1 + 1e-3 * self.inputs[:, 0]  # as a norm leaves them: nearly a constant in there
        self.one = torch.ones(3000, 1, dtype=torch.float64)
        self.gate, self.up, self.down = random(WIDTH, SIZE + 1), random(WIDTH, SIZE + 1), random(SIZE, WIDTH)
        self.gate[:, -1 if has_bias else 0] += slope
        if not has_bias:
            self.gate[:, -1] = self.up[:, -1] = 0
        joint = torch.cat([self.activations(self.gate, self.up), self.inputs, self.one], 1)
        self.moments = GatedMoments(joint.T @ joint, self.down, 1e-9, has_bias, up_norm=2.0)

    def activations(self, gate: Tensor, up: Tensor) -> Tensor:
        inputs = torch.cat([self.inputs, self.one], 1)
        return F.silu(inputs @ gate.T) * (inputs @ up.T)

    @property
    def outputs(self) -> Tensor:
        return self.activations(self.gate, self.up) @ self.down.T

    def error_of(self, mixed: MixedChannels) -> float:
        gate, up = (torch.cat([own[mixed.kept], new]) for own, new in ((self.gate, mixed.gate), (self.up, mixed.up)))
        return (self.activations(gate, up) @ mixed.down.T - self.outputs).square().sum().item()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_linear", [1, 3, SIZE])
def test_the_channels_do_what_is_predicted(has_bias: bool, num_linear: int) -> None:
    ffn = Gated(has_bias)
    kept = torch.tensor([0, 3, 4, 11])
    mixed = mixed_channels(ffn.moments, kept, num_linear)
    assert mixed.down.shape == (SIZE, 4 + num_linear)
    assert ffn.error_of(mixed) == pytest.approx(mixed.error, rel=0.02)
    assert torch.allclose(mixed.up.norm(dim=1), torch.tensor(2.0, dtype=torch.float64))
    assert has_bias or (mixed.gate[:, -1] == 0).all() and (mixed.up[:, -1] == 0).all()


def test_with_every_rank_it_is_least_squares_on_channels_and_inputs() -> None:
    ffn = Gated(has_bias=True)
    for kept in (torch.tensor([2, 5]), torch.tensor([], dtype=torch.long)):
        features = torch.cat([ffn.activations(ffn.gate, ffn.up)[:, kept], ffn.inputs, ffn.one], 1)
        fitted = features @ torch.linalg.lstsq(features, ffn.outputs).solution
        expected = (fitted - ffn.outputs).square().sum().item()
        assert mixed_channels(ffn.moments, kept, SIZE).error == pytest.approx(expected, rel=1e-6)


def test_without_linear_channels_it_is_the_refit() -> None:
    ffn, kept = Gated(has_bias=True), torch.arange(9)
    features = ffn.activations(ffn.gate, ffn.up)[:, kept]
    solution = torch.linalg.lstsq(features, ffn.outputs).solution
    mixed = mixed_channels(ffn.moments, kept, 0)
    assert torch.allclose(mixed.down, solution.T, atol=1e-6)
    assert mixed.error == pytest.approx((features @ solution - ffn.outputs).square().sum().item(), rel=1e-6)


def test_no_other_map_of_the_rank_is_better() -> None:
    ffn, kept = Gated(has_bias=True), torch.tensor([1, 7])
    best = mixed_channels(ffn.moments, kept, 2).error
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([ffn.inputs, ffn.one], 1)
    for scale in (0.01, 0.1, 1.0):
        maps = mixed_channels(ffn.moments, kept, 2).up
        maps = maps + scale * torch.randn(maps.shape, generator=generator, dtype=torch.float64)
        features = torch.cat([ffn.activations(ffn.gate, ffn.up)[:, kept], rows @ maps.T], 1)
        solution = torch.linalg.lstsq(features, ffn.outputs).solution
        assert (features @ solution - ffn.outputs).square().sum().item() > best


def test_linear_channels_are_taken_where_the_ffn_is_nearly_linear_only() -> None:
    for slope, expected in ((20.0, True), (0.0, False)):
        ffn = Gated(has_bias=True, slope=slope)
        gram = ffn.moments.joint[:WIDTH, :WIDTH]
        mixed = best_mixture(ffn.moments, obs_order(gram, ffn.down, 1e-9), 15)
        assert (mixed is not None) == expected
        assert mixed is None or len(mixed.kept) + len(mixed.gate) == 15
