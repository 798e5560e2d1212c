"""Uniform architectures near a target: all of the grid, with the parameters that transformers' own models have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from puzzle.search.uniform import UniformGrid, uniform_shapes
from puzzle.types import ConfigError, ModelShape
from puzzle.variants import model_params

SHAPE = ModelShape("llama", 4, 64, 8, 4, 8, 96, 128, 256, tied_embeddings=False)
LLAMA_8B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False)
GRID = UniformGrid([32, 48, 64], [48, 72, 96], [4, 6, 8], [2, 3, 4])


def test_parameters_are_those_of_the_model() -> None:
    for shape in uniform_shapes(SHAPE, GRID, 60_000, within=0.1):
        config = MistralConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
        )
        with torch.device("meta"):
            model = MistralForCausalLM(config)
        assert sum(one.numel() for one in model.parameters()) == model_params(shape)


def test_all_of_the_grid_that_are_near_and_no_other() -> None:
    target, within = 60_000, 0.05
    found = uniform_shapes(SHAPE, GRID, target, within)
    brute = {
        replace(SHAPE, hidden_size=h, intermediate_size=f, num_attention_heads=a, num_kv_heads=a // 2, num_layers=n)
        for h in GRID.hidden_sizes
        for f in GRID.intermediate_sizes
        for a in GRID.num_attention_heads
        for n in GRID.num_layers
    }
    assert set(found) == {one for one in brute if abs(model_params(one) - target) <= within * target}
    assert 1 < len(found) < len(brute)
    distances = [abs(model_params(one) - target) for one in found]
    assert distances == sorted(distances)


def test_the_papers_own_shapes_are_found() -> None:
    """Llama-3.1-Minitron-4B, by width and by depth: 4.5B parameters each."""
    width = UniformGrid(hidden_sizes=[3072, 4096], intermediate_sizes=[9216, 14336])
    (found,) = uniform_shapes(LLAMA_8B, width, 4_500_000_000)
    assert (found.hidden_size, found.intermediate_size, found.num_layers) == (3072, 9216, 32)
    (found,) = uniform_shapes(LLAMA_8B, UniformGrid(num_layers=range(8, 33, 4)), 4_500_000_000)
    assert found.num_layers == 16
    assert model_params(found) == pytest.approx(4.54e9, rel=0.01)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(
        ConfigError, match="num_attention_heads 5: give a number of at most 8, the teacher's and a mult"
    ):
        uniform_shapes(SHAPE, UniformGrid(num_attention_heads=[5]), 50_000)
    with pytest.raises(ConfigError, match="hidden_size 128: give a number of at most 64"):
        uniform_shapes(SHAPE, UniformGrid(hidden_sizes=[128]), 50_000)
    with pytest.raises(ConfigError, match=r"no architecture of the grid has 10 parameters.*nearest has"):
        uniform_shapes(SHAPE, GRID, 10)
    moe = replace(SHAPE, moe_layers=(0,), num_experts=2, num_active_experts=1, moe_intermediate_size=8)
    with pytest.raises(ConfigError, match="experts"):
        uniform_shapes(moe, GRID, 10)
