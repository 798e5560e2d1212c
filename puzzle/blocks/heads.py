"""KV heads merged in groups of equal size: which with which, and into what.

Computed from the attention's weights and the second moments C (D+1, D+1) of its input, to which a constant one is
appended: biases are one more column. Keys and queries are the business of :mod:`puzzle.blocks.keys`.

**Values.** Head h adds ``O_h V_h x`` per unit of attention. A group's one V' spans the best common subspace: the top d
right singular vectors of its stacked ``O_h V_h`` under the metric C. With ``O_hᵀ O_h = E_h² `` (summed over the queries
of h) and ``R_h = E_h V_h``, those are the top eigenvectors B of the stacked R C Rᵀ: ``V' = Σ_h B_hᵀ R_h`` and
``O'_h = O_h E_h⁻¹ B_h``.

**Groups.** Permuting KV heads with their queries and their columns of the output projection changes nothing, so they
are free: swaps from the neighbours' grouping on, as long as they lower the sum over pairs of what merging them costs.

**QK-norm** divides every query and key by its own size. Keys are merged as if that were one constant per head: only an
approximation, and yet half the error of averaging them (an attention of the demo teacher, retrained with QK-norm).

Shapes: D hidden size, H query heads of d channels, K KV heads, r = H/K; the variant's G groups of m = K/G heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from puzzle.blocks.keys import Distances, PooledKeys, ScoreMoments, cross_head, pool_keys

KEY_SHARE = 1 / 3  # what the keys' error counts against the values' when heads are grouped
RANK_FLOOR = 1e-6  # of the largest singular value
GAIN_FLOOR = 1e-2  # of the mean


@dataclass(frozen=True)
class Gains:
    """What QK-norm multiplies the normed ``query`` and ``key`` with, each (d,)."""

    query: Tensor
    key: Tensor


def gains_of(attention: Any) -> Gains | None:
    """Of a family's attention module; None where it has no QK-norm."""
    if not hasattr(attention, "k_norm"):
        return None
    # families differ in what a norm makes of its weight, and all make it of a vector of ones
    ones = torch.ones_like(attention.k_norm.weight)
    return Gains(attention.q_norm(ones), attention.k_norm(ones))


@dataclass(frozen=True)
class Heads:
    """Weights by head in fp64, biases as the last column: ``query`` (H, d, D+1), ``key`` and ``value`` (K, d, D+1),
    ``output`` (H, D, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Tensor], head_dim: int, device: torch.device) -> Heads:
        """From the tensors of a layer, by their names there."""

        def rows(name: str) -> Tensor:
            weight = state[f"self_attn.{name}_proj.weight"].to(device).double()
            bias = state.get(f"self_attn.{name}_proj.bias")
            column = weight.new_zeros(len(weight)) if bias is None else bias.to(device).double()
            by_head: Tensor = torch.cat([weight, column[:, None]], 1).unflatten(0, (-1, head_dim))
            return by_head

        output = state["self_attn.o_proj.weight"].to(device).double()
        return cls(rows("q"), rows("k"), rows("v"), output.unflatten(1, (-1, head_dim)).transpose(0, 1))

    def state(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``like`` with these weights in place of its own, of its dtype and on its device."""
        flat = {"q": self.query.flatten(0, 1), "k": self.key.flatten(0, 1), "v": self.value.flatten(0, 1)}
        new = {f"self_attn.{name}_proj.weight": rows[:, :-1] for name, rows in flat.items()}
        new |= {f"self_attn.{name}_proj.bias": rows[:, -1] for name, rows in flat.items()}
        new["self_attn.o_proj.weight"] = self.output.transpose(0, 1).flatten(1)
        return {name: new[name].to(tensor).contiguous() if name in new else tensor for name, tensor in like.items()}


def mean_pooled(heads: Heads, num_groups: int) -> Heads:
    """The paper's: neighbours merged, K and V their means."""
    key, value = (rows.unflatten(0, (num_groups, -1)).mean(1) for rows in (heads.key, heads.value))
    return Heads(heads.query, key, value, heads.output)


def regrouped(heads: Heads, groups: Tensor) -> Heads:
    """The same attention with its KV heads in the order of ``groups`` (G, m)."""
    order = groups.flatten()

    def permuted(of_queries: Tensor) -> Tensor:
        by_key: Tensor = of_queries.unflatten(0, (len(heads.key), -1))
        return by_key[order].flatten(0, 1)

    return Heads(permuted(heads.query), heads.key[order], heads.value[order], permuted(heads.output))


def merged_heads(
    heads: Heads, covariance: Tensor, distances: Distances, num_groups: int, gains: Gains | None = None
) -> Heads:
    """``num_groups`` KV heads by the module's description; ``covariance`` is C, ``gains`` are those of a QK-norm."""
    keyed = heads if gains is None else _through_norm(heads, covariance, gains)
    scores, values = ScoreMoments.of(keyed.query, keyed.key, covariance), ValueMoments.of(heads, covariance)
    groups = grouping(pair_costs(scores, values, distances), num_groups)
    pooled = pool_keys(scores, groups, distances)
    merged = _apply_keys(regrouped(keyed, groups), pooled)
    if gains is not None:
        merged = _before_norm(merged, heads, covariance, gains)
    value, output = _merged_values(values, groups, regrouped(heads, groups), covariance)
    return Heads(merged.query, merged.key, value, output)


def _apply_keys(heads: Heads, pooled: PooledKeys) -> Heads:
    """``heads`` in the order of the groups, with the groups' keys and queries; both of the old ones' mean energy."""
    key = heads.key.unflatten(0, pooled.mix.shape[:2])  # (G, m, d, D+1)
    new_key = (pooled.mix @ key).sum(1)
    scale = (key.square().sum((2, 3)).mean(1) / new_key.square().sum((1, 2))).sqrt()[:, None, None]  # (G, 1, 1)
    turn = (pooled.turn / scale[:, None]).flatten(0, 1)  # (K, d, d)
    query = heads.query.unflatten(0, (len(turn), -1))  # (K, r, d, D+1)
    return Heads((turn[:, None] @ query).flatten(0, 1), new_key * scale, heads.value, heads.output)


# ------------------------------------------------------------------------------------------------------- QK-norm


def _through_norm(heads: Heads, covariance: Tensor, gains: Gains) -> Heads:
    """Queries and keys as after the norm, if each head's root mean square were constant."""
    query, key = (
        rows / _size(rows, covariance) * gain.to(rows)[:, None]
        for rows, gain in ((heads.query, gains.query), (heads.key, gains.key))
    )
    return Heads(query, key, heads.value, heads.output)


def _before_norm(heads: Heads, like: Heads, covariance: Tensor, gains: Gains) -> Heads:
    """What the norm takes to these queries and keys, but for their size, which is the mean one of ``like``."""

    def undone(rows: Tensor, gain: Tensor, old: Tensor) -> Tensor:
        gain = gain.to(rows)
        floor = GAIN_FLOOR * gain.abs().mean()
        rows = rows / torch.where(gain.abs() < floor, floor, gain)[:, None]
        return rows / _size(rows, covariance) * _size(old, covariance).mean()

    query, key = undone(heads.query, gains.query, like.query), undone(heads.key, gains.key, like.key)
    return Heads(query, key, heads.value, heads.output)


def _size(rows: Tensor, covariance: Tensor) -> Tensor:
    """(..., 1, 1) root mean square over channels and tokens of what ``rows`` (..., d, D+1) make of the input."""
    mean = ((rows @ covariance) * rows).sum((-1, -2)) / covariance[-1, -1] / rows.shape[-2]
    return mean.clamp_min(torch.finfo(rows.dtype).tiny).sqrt()[..., None, None]


# -------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueMoments:
    """``rows`` R (K, d, D+1), ``inverse_root`` E⁻¹ (K, d, d), ``energy`` R C Rᵀ (K, K, d, d); R and E as above."""

    rows: Tensor
    inverse_root: Tensor
    energy: Tensor

    @classmethod
    def of(cls, heads: Heads, covariance: Tensor) -> ValueMoments:
        squares = (heads.output.mT @ heads.output).unflatten(0, (len(heads.key), -1)).sum(1)  # (K, d, d)
        values, vectors = torch.linalg.eigh(squares)
        root = values.clamp_min(0).sqrt()
        root = root.maximum(RANK_FLOOR * root.amax(-1, keepdim=True)).clamp_min(torch.finfo(root.dtype).tiny)
        rows = (vectors * root[:, None]).mT @ heads.value
        return cls(rows, vectors / root[:, None], cross_head(rows, covariance / covariance[-1, -1]))

    def stacked(self, groups: Tensor) -> Tensor:
        """(G, m d, m d): R C Rᵀ of each group's stacked R."""
        energy = self.energy[groups[:, :, None], groups[:, None, :]]  # (G, m, m, d, d)
        return energy.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _merged_values(moments: ValueMoments, groups: Tensor, ordered: Heads, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """V' (G, d, D+1) and O' (H, D, d); V' has the mean energy of the old values."""
    size = moments.rows.shape[1]
    basis = torch.linalg.eigh(moments.stacked(groups)).eigenvectors[..., -size:]  # (G, m d, d)
    basis = basis.unflatten(1, (groups.shape[1], size))  # (G, m, d, d)
    value = (basis.mT @ moments.rows[groups]).sum(1)
    old = _size(ordered.value, covariance).unflatten(0, groups.shape).square().mean(1).sqrt()  # (G, 1, 1)
    scale = old / _size(value, covariance)
    change = (moments.inverse_root[groups] @ basis / scale[:, None]).flatten(0, 1)  # (K, d, d)
    output = ordered.output.unflatten(0, (len(change), -1)) @ change[:, None]  # (K, r, D, d)
    return value * scale, output.flatten(0, 1)


# -------------------------------------------------------------------------------------------------------- groups


def pair_costs(scores: ScoreMoments, values: ValueMoments, distances: Distances) -> Tensor:
    """(K, K) symmetric: what merging two heads costs values and keys, each in units of its mean over all pairs."""
    count, size = values.rows.shape[:2]
    total = torch.zeros(count, count, dtype=torch.float64)
    if count == 1:
        return total
    pairs = torch.tensor(list(combinations(range(count), 2)), device=values.rows.device)  # (P, 2)
    lost_values = torch.linalg.eigvalsh(values.stacked(pairs))[:, :-size].clamp_min(0).sum(1)
    lost_scores = pool_keys(scores, pairs, distances).error.clamp_min(0)
    for lost, share in ((lost_values, 1.0), (lost_scores, KEY_SHARE)):
        cost = (share * lost / lost.mean().clamp_min(torch.finfo(lost.dtype).tiny)).cpu()
        total[pairs[:, 0].cpu(), pairs[:, 1].cpu()] += cost
    return total + total.T


def grouping(costs: Tensor, num_groups: int) -> Tensor:
    """(G, m) heads of each group, in ascending order: swaps from the neighbours' grouping on while they lower the sum
    of ``costs`` (K, K) within groups; a local minimum, reached deterministically."""
    groups = torch.arange(len(costs)).view(num_groups, -1).tolist()
    cost: list[list[float]] = costs.tolist()

    def joining(head: int, group: list[int], instead_of: int) -> float:
        return sum(cost[head][other] for other in group if other != instead_of)

    improved = True
    while improved:
        improved = False
        for first, second in combinations(groups, 2):
            for i, j in product(range(len(first)), range(len(second))):
                a, b = first[i], second[j]
                before = joining(a, first, a) + joining(b, second, b)
                if joining(b, first, a) + joining(a, second, b) < before * (1 - 1e-9):
                    first[i], second[j], improved = b, a, True
    return torch.tensor(sorted(sorted(group) for group in groups))
