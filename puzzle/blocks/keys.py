"""Keys of several heads merged into one, and their queries changed to suit: alternating least squares on the scores.

Query and key of head h meet as ``q_hᵀ R_n k_h``, with R_n the rotary embedding's turn by the n tokens between them. A
group's one key ``k' = Σ_h N_h k_h`` and its new queries ``q'_h = M_h q_h`` minimise the squared error of these scores,
given only the second moments C (D+1, D+1) of the attention's input, to which a constant one is appended for biases:

    M_h = S⁻¹ X_h     S = E_n R_n Cov(k', k') R_nᵀ             X_h = E_n R_n Cov(k', k_h) R_nᵀ
    N_h = T⁻¹ Y_h     T = Σ_h E_n R_nᵀ M_h E[q_h q_hᵀ] M_hᵀ R_n   Y_h = E_n R_nᵀ M_h E[q_h q_hᵀ] R_n

Cov is centred as seen through R_n, because what shifts all scores of a query alike does nothing to a softmax. Whatever
commutes with every R_n, a complex factor per plane (i, i + d/2), so moves between queries and keys exactly; planes that
turn at almost the same speed are mixed too. Distances n count in proportion to 1/(1+n).

Shapes: K KV heads of d channels; G groups of m of them, ``groups`` (G, m) their indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.blocks.moments import cholesky, damped

STEPS = 6  # more than 8 change the loss by less than 1 %
DAMPING = 1e-6  # relative, towards the last iterate: for directions without evidence


@dataclass(frozen=True)
class Distances:
    """Means over the distance n, of planes a and b that turn by θ per token: ``same`` (d/2, d/2) of
    ``exp(−in(θ_a − θ_b))``, ``mirrored`` of ``exp(−in(θ_a + θ_b))``, and ``alone`` (d/2,) of ``exp(−inθ)``."""

    same: Tensor
    mirrored: Tensor
    alone: Tensor

    @classmethod
    def up_to(cls, num_tokens: int, angles: Tensor) -> Distances:
        """``angles`` θ (d/2,) in radians."""
        distance = torch.arange(num_tokens, dtype=torch.float64, device=angles.device)
        share = 1 / (1 + distance)
        phases = torch.polar(torch.ones_like(angles[None].double()), -distance[:, None] * angles.double())
        weighted = (phases * (share / share.sum())[:, None]).T  # (d/2, tokens)
        return cls(weighted @ phases.conj(), weighted @ phases, weighted.sum(1))

    def turned(self, covariance: Tensor, back: bool = False) -> Tensor:
        """``E_n R_n Cov R_nᵀ`` of (..., d, d); ``back``: with the opposite rotation."""
        (rr, ri), (ir, ii) = (half.chunk(2, -1) for half in covariance.chunk(2, -2))
        same, mirrored = (self.same.conj(), self.mirrored.conj()) if back else (self.same, self.mirrored)
        hermitian = torch.complex(rr + ii, ir - ri) * same  # E[z z̄ᵀ] of the planes as complex numbers z
        plain = torch.complex(rr - ii, ir + ri) * mirrored  # E[z zᵀ]
        upper = torch.cat([(hermitian + plain).real, (plain - hermitian).imag], -1)
        lower = torch.cat([(plain + hermitian).imag, (hermitian - plain).real], -1)
        return torch.cat([upper, lower], -2) / 2

    def seen(self, mean: Tensor) -> Tensor:
        """``E_n R_n mean`` of (..., d)."""
        real, imaginary = mean.chunk(2, -1)
        turned = torch.complex(real, imaginary) * self.alone
        return torch.cat([turned.real, turned.imag], -1)


@dataclass(frozen=True)
class ScoreMoments:
    """What the scores' error depends on: ``key`` (K, K, d, d) E[k_h k_iᵀ], ``key_mean`` (K, d), ``query`` (K, d, d)."""

    key: Tensor
    key_mean: Tensor
    query: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, covariance: Tensor) -> ScoreMoments:
        """From weights ``query`` (H, d, D+1), ``key`` (K, d, D+1) and C (D+1, D+1), a sum over tokens."""
        mean = covariance / covariance[-1, -1]
        queries = (query @ mean) @ query.mT  # (H, d, d)
        return cls(cross_head(key, mean), key @ mean[:, -1], queries.unflatten(0, (len(key), -1)).sum(1))


@dataclass(frozen=True)
class PooledKeys:
    """Per group: ``mix`` N and ``turn`` M, each (G, m, d, d), and the scores' squared ``error`` (G,)."""

    mix: Tensor
    turn: Tensor
    error: Tensor


def pool_keys(moments: ScoreMoments, groups: Tensor, distances: Distances, steps: int = STEPS) -> PooledKeys:
    """The keys of ``groups`` (G, m) merged, by the alternating least squares of the module's docstring.

    Starts from the group's strongest head: means of keys may cancel.
    """
    key = moments.key[groups[:, :, None], groups[:, None, :]]  # (G, m, m, d, d)
    mean, query = moments.key_mean[groups], moments.query[groups]
    own = key.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)  # (G, m, d, d)

    def centred(covariance: Tensor, left: Tensor, right: Tensor) -> Tensor:
        left, right = distances.seen(left), distances.seen(right)
        return distances.turned(covariance) - left[..., :, None] * right[..., None, :]

    identity = torch.eye(key.shape[-1]).to(key).expand_as(own)
    strongest = (trace(own) * trace(query)).argmax(1)
    mix = identity * torch.nn.functional.one_hot(strongest, groups.shape[1])[..., None, None]
    turn = identity
    for step in range(steps):
        if step:
            mixed = (turn @ query @ turn.mT).sum(1, keepdim=True)
            mix = _solve(distances.turned(mixed, back=True), distances.turned(turn @ query, back=True), mix)
        pooled_mean = (mix @ mean[..., None]).sum(1, keepdim=True).squeeze(-1)  # (G, 1, d)
        with_own = torch.einsum("gmab,gmibc->giac", mix, key)  # Cov(k', k_i): (G, m, d, d)
        within = (with_own @ mix.mT).sum(1, keepdim=True)
        scores, targets = centred(within, pooled_mean, pooled_mean), centred(with_own, pooled_mean, mean)
        turn = _solve(scores, targets, turn)
    difference = centred(own, mean, mean) - 2 * turn.mT @ targets + turn.mT @ scores @ turn
    return PooledKeys(mix, turn, (query * difference).sum((1, 2, 3)))


def _solve(matrix: Tensor, right: Tensor, last: Tensor) -> Tensor:
    """``matrix⁻¹ right``, damped towards ``last``: (G, 1, d, d) and twice (G, m, d, d)."""
    return last + torch.cholesky_solve(right - matrix @ last, cholesky(damped(matrix, DAMPING)).expand_as(right))


def trace(matrix: Tensor) -> Tensor:
    """Of (..., d, d)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def cross_head(weights: Tensor, covariance: Tensor) -> Tensor:
    """``W_h C W_iᵀ`` (K, K, d, d) of ``weights`` W (K, d, D+1)."""
    flat = weights.flatten(0, 1)
    size = weights.shape[:2]
    products: Tensor = (flat @ covariance @ flat.T).unflatten(1, size).unflatten(0, size)  # (K, d, K, d)
    return products.transpose(1, 2)
