"""Merged keys against scores that are computed token by token with transformers' own rotary embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from puzzle.blocks.keys import Distances, ScoreMoments, cross_head, pool_keys

HEAD_DIM, SPAN = 8, 23
ANGLES = torch.tensor([1.0, 0.3, 0.05, 0.002])


def turn(distance: int) -> Tensor:
    """R_n (d, d): what the rotary embedding does to a key that lies ``distance`` tokens before the query."""
    angle = torch.cat([-distance * ANGLES] * 2).double()
    rows = torch.eye(HEAD_DIM, dtype=torch.float64)[None, None]
    _, turned = apply_rotary_pos_emb(rows, rows, angle.cos()[None], angle.sin()[None])
    return turned[0, 0].T


def shares() -> list[tuple[float, Tensor]]:
    total = sum(1 / (1 + n) for n in range(SPAN))
    return [(1 / (1 + n) / total, turn(n)) for n in range(SPAN)]


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


def covariance(size: int) -> Tensor:
    """Of 500 tokens that are not centred, with a constant one."""
    tokens = torch.cat([random(500, size) @ random(size, size) + 0.7, torch.ones(500, 1)], 1)
    return tokens.T @ tokens


def distances() -> Distances:
    return Distances.up_to(SPAN, ANGLES)


def test_turned_is_the_mean_over_distances() -> None:
    matrix = random(2, HEAD_DIM, HEAD_DIM)
    forward = sum(share * rotation @ matrix @ rotation.T for share, rotation in shares())
    back = sum(share * rotation.T @ matrix @ rotation for share, rotation in shares())
    assert torch.allclose(distances().turned(matrix), forward, atol=1e-6)
    assert torch.allclose(distances().turned(matrix, back=True), back, atol=1e-6)
    mean = random(3, HEAD_DIM)
    assert torch.allclose(
        distances().seen(mean), sum(share * mean @ rotation.T for share, rotation in shares()), atol=1e-6
    )


def test_moments_are_those_of_queries_and_keys() -> None:
    query, key, total = random(4, HEAD_DIM, 11), random(2, HEAD_DIM, 11), covariance(10)
    found = ScoreMoments.of(query, key, total)
    assert torch.allclose(found.key[0, 1], key[0] @ total @ key[1].T / 500)
    assert torch.allclose(cross_head(key, total)[1, 0], key[1] @ total @ key[0].T)
    assert torch.allclose(found.key_mean[1], key[1] @ total[:, -1] / 500)
    assert torch.allclose(found.query[1], (query[2] @ total @ query[2].T + query[3] @ total @ query[3].T) / 500)


def test_the_error_is_that_of_the_scores() -> None:
    query, key, total = random(3, HEAD_DIM, 11), random(3, HEAD_DIM, 11), covariance(10) / 500
    pooled = pool_keys(ScoreMoments.of(query, key, total), torch.tensor([[0, 2, 1]]), distances())
    merged = sum(pooled.mix[0, place] @ key[head] for place, head in enumerate((0, 2, 1)))
    error = 0.0
    for place, head in enumerate((0, 2, 1)):
        # (q' R k' - q R k) for all distances, as a matrix between a query's and a key's token
        maps = [
            (share, query[head].T @ (pooled.turn[0, place].T @ rotation @ merged - rotation @ key[head]))
            for share, rotation in shares()
        ]
        centre = sum(share * one for share, one in maps) @ total[:, -1]
        error += sum(share * (total @ one @ total @ one.T).trace() for share, one in maps) - centre @ total @ centre
    assert pooled.error.item() == pytest.approx(float(error), rel=1e-5)


def test_steps_lower_the_error() -> None:
    query, key, total = random(4, HEAD_DIM, 11), random(4, HEAD_DIM, 11), covariance(10)
    total[-1, :-1] = total[:-1, -1] = 0  # keys of mean zero: then every step is a minimum of the same sum
    groups = torch.tensor([[0, 1], [2, 3]])
    errors = [pool_keys(ScoreMoments.of(query, key, total), groups, distances(), steps).error for steps in (1, 2, 4, 8)]
    assert all((later <= earlier * (1 + 1e-9)).all() for earlier, later in zip(errors, errors[1:], strict=False))
    assert (errors[-1] < 0.95 * errors[0]).all()


def test_a_head_alone_stays_what_it_is() -> None:
    query, key, total = random(2, HEAD_DIM, 11), random(2, HEAD_DIM, 11), covariance(10)
    pooled = pool_keys(ScoreMoments.of(query, key, total), torch.tensor([[0], [1]]), distances())
    assert torch.allclose(pooled.mix, torch.eye(HEAD_DIM, dtype=torch.float64).expand(2, 1, -1, -1), atol=1e-6)
    assert torch.allclose(pooled.turn, torch.eye(HEAD_DIM, dtype=torch.float64).expand(2, 1, -1, -1), atol=1e-6)
    assert pooled.error.abs().max() < 1e-8 * ScoreMoments.of(query, key, total).query.abs().max()


def test_what_turns_with_the_planes_moves_to_the_queries_exactly() -> None:
    """Keys that are complex multiples of one another, plane by plane: opposite ones, too, whose mean is nothing."""
    query, key, total = random(3, HEAD_DIM, 11), random(3, HEAD_DIM, 11), covariance(10)
    planes = torch.complex(*key[0].chunk(2))
    for head, factor in (
        (1, -torch.ones(4, dtype=torch.complex128)),
        (2, torch.polar(random(4).abs() + 0.2, random(4))),
    ):
        multiple = planes * factor[:, None]
        key[head] = torch.cat([multiple.real, multiple.imag])
    moments = ScoreMoments.of(query, key, total)
    pooled = pool_keys(moments, torch.tensor([[0, 1, 2]]), distances())
    scale = (moments.query * distances().turned(moments.key.diagonal().permute(2, 0, 1))).sum()
    assert pooled.error.item() < 1e-9 * scale
