"""Combinations of sizes near a target: all of the grid, the nearest first, and the papers' own among them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from pydantic import ValidationError

from puzzle.config import PruneConfig
from puzzle.pruning import combinations, pruned_shape
from puzzle.types import ConfigError, ModelShape
from puzzle.variants import model_params

SHAPE = ModelShape("llama", 4, 64, 8, 4, 8, 96, 128, 256, tied_embeddings=False)
LLAMA_8B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False)
SIZES = {
    "hidden_size": (32, 48, 64),
    "intermediate_size": (48, 72, 96),
    "num_key_value_heads": (2, 3, 4),
    "num_layers": (2, 3, 4),
}


def settings(**grid: object) -> PruneConfig:
    return PruneConfig.model_validate({"grid": grid})


def test_all_of_the_grid_that_are_near_and_no_other() -> None:
    found = [pruned_shape(one, SHAPE) for one in combinations(settings(params=60_000, **SIZES), SHAPE, 1000)]
    every = [
        replace(SHAPE, hidden_size=h, intermediate_size=f, num_attention_heads=2 * k, num_kv_heads=k, num_layers=n)
        for h, f, k, n in itertools.product(*SIZES.values())
        if h % (2 * k) == 0  # else no Llama
    ]
    distances = {one: abs(model_params(one) - 60_000) for one in every}
    assert set(found) == {one for one in every if distances[one] <= 0.05 * 60_000}
    assert 1 < len(found) < len(every)
    assert [distances[one] for one in found] == sorted(distances[one] for one in found)
    nearest = combinations(settings(params=60_000, **SIZES), SHAPE, 2)
    assert [pruned_shape(one, SHAPE) for one in nearest] == found[:2]


def test_the_papers_own_shapes_are_found() -> None:
    """Llama-3.1-Minitron-4B, by width and by depth: 4.5B parameters each."""
    width = settings(params=4_500_000_000, hidden_size=[3072, 4096], intermediate_size=[9216, 14336])
    (found,) = combinations(width, LLAMA_8B, 9)
    assert (found.hidden_size, found.intermediate_size, found.num_layers) == (3072, 9216, None)
    depth = settings(params=4_500_000_000, num_layers=[*range(8, 33, 4)])
    (found,) = combinations(depth, LLAMA_8B, 9)
    assert found.num_layers == 16
    assert model_params(pruned_shape(found, LLAMA_8B)) == 4_540_469_248


def test_same_sizes_come_once_and_impossible_ones_not_at_all() -> None:
    both = settings(hidden_size=[48], num_attention_heads=[8, 6], num_key_value_heads=["100%", 4, 3])
    shapes = [pruned_shape(one, SHAPE) for one in combinations(both, SHAPE, 9)]
    assert [(one.num_attention_heads, one.num_kv_heads) for one in shapes] == [(8, 4), (6, 3)]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="prune.grid.hidden_size is 128, but the teacher has 64"):
        combinations(settings(hidden_size=[32, 128]), SHAPE, 2)
    with pytest.raises(ConfigError, match=r"no combination has 10 parameters, 5% more or less \(the nearest has"):
        combinations(settings(params=10, **SIZES), SHAPE, 2)
    with pytest.raises(ValidationError, match="give lists"):
        settings(params=10)
    with pytest.raises(ValidationError, match="given in prune and in its grid"):
        PruneConfig.model_validate({"hidden_size": 32, "grid": {"hidden_size": [32, 48]}})
