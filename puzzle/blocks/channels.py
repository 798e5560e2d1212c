"""FFN channels: in which order to drop them, the down projection refitted to those that stay, and channels that compute
a linear map in the place of some.

The FFN's output is exactly ``W x`` with W the down projection (D, I) and x the gated activation, so order and refit
need only the Gram matrix H = Σ x xᵀ (I, I) of :mod:`puzzle.blocks.moments`. An order is a permutation of the channels,
the most useful first; the first N are the variant ``narrow-N``, so every width is a prefix of every larger one.

**Linear channels.** A gated channel gives ``act(g·z) (u·z)``. Where ``g·z`` is the same large number α for every token,
``act(α) = α`` and the channel is linear. That needs no bias: what leaves a norm nearly contains a constant (the least
squares of 1 on z explains 99 % of it or more at every layer of the demo teacher). So r of a variant's N channels can
carry any map of rank r, and what the lost channels did linearly need not be lost with them: most of it, in a first
layer. All in closed form from the joint moments J (I+D+1, I+D+1) of gated activations x, inputs z and one:

    S = the first N − r of an order,   x̃, z̃, ỹ = what x_S does not explain of z and of y = W x
    B = argmin |B z̃ − ỹ|²,   P = top r eigenvectors of E[B z̃ (B z̃)ᵀ],   y ≈ W'_S x_S + P Pᵀ B z

and r, out of a few shares of N, by the error that is left (reduced-rank regression, Izenman 1975).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.blocks.moments import cholesky, damped, solve_shrunk

BLOCK_FRACTION = 0.01  # of the channels that are left are dropped per update of the whole inverse
CANDIDATES_PER_DROP = 4


def contribution_order(activity: Tensor, down: Tensor) -> Tensor:
    """(I,) by the paper's channel contribution: ``mean |x_i| · |W_i|``, from Σ|x| (I,) and ``down`` W (D, I)."""
    importance: Tensor = activity.double() * down.to(activity.device).double().norm(dim=0)
    return importance.argsort(descending=True)


def obs_order(gram: Tensor, down: Tensor, ridge: float) -> Tensor:
    """(I,) by backward elimination: each time the channel goes whose loss the others can make up for best.

    With H' = H + λ diag H, dropping i and refitting the rest costs ``|W_i|² / (H'⁻¹)_ii`` (optimal brain surgeon,
    Hassibi and Stork 1993, with all D outputs as one); then ``W ← W − H'⁻¹_:i W_i / (H'⁻¹)_ii`` and H'⁻¹ likewise.
    ``gram`` is H (I, I), ``down`` W (D, I). O(I³), and room for about four (I, I) matrices in fp64.

    Channels go 1 % at a time, so that the large updates are matrix products. Within such a block the choice is one by
    one and exact among the four times as many cheapest channels; that the others' costs wait for the block's end made
    no difference to the loss in the fourth digit, even at 5 % (512 channels).
    """
    inverse = torch.cholesky_inverse(cholesky(damped(gram, ridge)))
    weights = down.to(inverse).T.clone()  # (I, D)
    left = torch.arange(len(gram), device=gram.device)
    dropped: list[Tensor] = []
    while len(left):
        block = _cheapest(inverse, weights, max(1, int(BLOCK_FRACTION * len(left))))
        columns = inverse[:, block]  # (n, b)
        step = torch.cholesky_solve(columns.T, cholesky(columns[block]))  # (b, n)
        dropped.append(left[block])
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[block] = False
        weights = (weights - step.T @ weights[block])[stays]
        inverse = (inverse - columns @ step)[stays][:, stays]
        left = left[stays]
    return torch.cat(dropped).flip(0)


def _cheapest(inverse: Tensor, weights: Tensor, count: int) -> Tensor:
    """(count,) the channels to drop next, in that order; ``inverse`` (n, n) and ``weights`` (n, D) are left as is."""
    found = _costs(inverse, weights).topk(min(CANDIDATES_PER_DROP * count, len(inverse)), largest=False).indices
    inverse, weights = inverse[found][:, found], weights[found]
    chosen: list[Tensor] = []
    taken = torch.zeros_like(found, dtype=torch.bool)
    for _ in range(count):
        best = _costs(inverse, weights).masked_fill(taken, torch.inf).argmin()
        chosen.append(best)
        taken[best] = True
        ratio = inverse[:, best] / inverse[best, best]
        weights = weights - ratio[:, None] * weights[best]
        inverse = inverse - ratio[:, None] * inverse[best]
    return found[torch.stack(chosen)]


def _costs(inverse: Tensor, weights: Tensor) -> Tensor:
    return weights.square().sum(1) / inverse.diagonal().clamp_min(torch.finfo(inverse.dtype).tiny)


def refit_down(gram: Tensor, down: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """(D, N) fp64: the down projection of the channels ``kept`` (N,), fitted to the whole FFN's output.

        W'_S = W_S + (H_SS + λ diag H_SS)⁻¹ H_S: (W − W_S)      shrunk towards the teacher's own columns

    from ``gram`` H (I, I) and ``down`` W (D, I) alone: the same as least squares on the activations.
    """
    rows = gram[kept]  # (N, I)
    return solve_shrunk(rows[:, kept], rows @ down.to(rows).T, down[:, kept.to(down.device)], ridge)


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
