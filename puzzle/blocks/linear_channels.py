"""FFN channels that compute a linear map: a narrow FFN made of some of the teacher's channels and some of these.

A gated channel gives ``act(g·z) (u·z)``. Where ``g·z`` is the same large number α for every token, ``act(α) = α`` and
the channel is linear. That needs no bias: what leaves a norm nearly contains a constant (the least squares of 1 on z
explains 99 % of it or more at every layer of the demo teacher). So r of a variant's N channels can carry any map of
rank r, and what the lost channels did linearly need not be lost with them: most of it, in a first layer. All in closed
form from the joint moments J (I+D+1, I+D+1) of gated activations x, inputs z and one:

    S = the first N − r of an order,   x̃, z̃, ỹ = what x_S does not explain of z and of y = W x
    B = argmin |B z̃ − ỹ|²,   P = top r eigenvectors of E[B z̃ (B z̃)ᵀ],   y ≈ W'_S x_S + P Pᵀ B z

and r, out of a few shares of N, by the error that is left (reduced-rank regression, Izenman 1975).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.blocks.moments import cholesky, damped, solve_shrunk

ALPHA = 10.0  # silu(10) = 9.9995
SHARES = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)  # of the channels, to be linear
CONSTANT_RIDGE = 1e-3  # for g: a smaller norm is worth more than the last percent of a constant


@dataclass(frozen=True)
class MixedChannels:
    """``kept`` (N−r,) of the teacher's channels, then r linear ones with ``gate`` and ``up`` rows (r, D+1), biases as
    last column; ``down`` (D, N). ``error`` is what is left of Σ |y|²."""

    kept: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    error: float


@dataclass(frozen=True)
class GatedMoments:
    """``joint`` J, ``down`` W (D, I) in fp64, ``ridge`` λ. ``has_bias``: gate and up projection have one, so that the
    constant one is an input like others. ``up_norm``: what the norm of a new row of the up projection should be; rows
    much smaller than the teacher's own train badly at a common learning rate."""

    joint: Tensor
    down: Tensor
    ridge: float
    has_bias: bool
    up_norm: float

    @property
    def inputs(self) -> Tensor:
        """Indices of z in J, (D,) or, with the constant one, (D+1,)."""
        size, width = self.down.shape
        return torch.arange(width, width + size + self.has_bias, device=self.joint.device)

    @property
    def target(self) -> Tensor:
        """(D, I+D+1) Σ y (x, z, 1)ᵀ."""
        return self.down @ self.joint[: self.down.shape[1]]


def mixed_channels(moments: GatedMoments, kept: Tensor, num_linear: int) -> MixedChannels:
    """The best down projection and linear channels beside the teacher's channels ``kept`` (N−r,), for r of them."""
    joint, inputs, target, down = moments.joint, moments.inputs, moments.target, moments.down
    size = len(down)
    to_inputs, to_target = joint[kept][:, inputs], target[:, kept].T  # (N-r, D'), (N-r, D); D' is D or D + 1
    factor = cholesky(damped(joint[kept][:, kept], moments.ridge))
    by_inputs, by_target = torch.cholesky_solve(to_inputs, factor), torch.cholesky_solve(to_target, factor)
    left = joint[inputs][:, inputs] - to_inputs.T @ by_inputs  # Σ z̃ z̃ᵀ
    wanted = target[:, inputs].T - to_inputs.T @ by_target  # Σ z̃ ỹᵀ
    linear = torch.cholesky_solve(wanted, cholesky(damped(left, moments.ridge)))  # Bᵀ (D', D)
    energy, directions = torch.linalg.eigh((wanted.T @ linear + linear.T @ wanted) / 2)
    energy, directions = energy[size - num_linear :], directions[:, size - num_linear :]  # (r,), (D, r)
    maps = (linear @ directions).T  # (r, D')
    scale = (maps.norm(dim=1) / moments.up_norm).clamp_min(torch.finfo(joint.dtype).tiny)
    restored = by_target - by_inputs @ linear @ directions @ directions.T  # (N-r, D)
    before = (target[:, : down.shape[1]] * down).sum() - (to_target * by_target).sum()
    return MixedChannels(
        kept,
        _with_bias(ALPHA * _constant(moments).expand(num_linear, -1), size),
        _with_bias(maps / scale[:, None], size),
        torch.cat([restored.T, directions * scale / ALPHA], 1),
        (before - energy.sum()).item(),
    )


def best_mixture(moments: GatedMoments, order: Tensor, width: int) -> MixedChannels | None:
    """The mixture of ``width`` channels with the least error, of the teacher's first in ``order`` (I,); None where it
    is one without linear channels."""
    ranks = {min(max(1, round(share * width)), len(moments.down)) for share in SHARES}
    found = (mixed_channels(moments, order[: width - rank].sort().values, rank) for rank in sorted({0, *ranks}))
    best = min(found, key=lambda one: one.error)
    return best if len(best.gate) else None


def _constant(moments: GatedMoments) -> Tensor:
    """(1, D') g with g·z ≈ 1."""
    within = moments.joint[moments.inputs][:, moments.inputs]
    ones = moments.joint[moments.inputs][:, -1:]
    return solve_shrunk(within, ones, torch.zeros_like(ones.T), CONSTANT_RIDGE)


def _with_bias(rows: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, size + 1 - rows.shape[1]))
