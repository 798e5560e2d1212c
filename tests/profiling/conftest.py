"""A tiny shape, its config, and models with random weights for the profiling tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlamaConfig

from puzzle.modeling import PuzzleConfig
from puzzle.types import ModelShape


@pytest.fixture(scope="session")
def shape() -> ModelShape:
    """4 heads of 8 over hidden 24, so that heads · head_dim differs from the hidden size."""
    return ModelShape("llama", 3, 24, 4, 4, 8, 40, 96, 64, tied_embeddings=False)


@pytest.fixture(scope="session")
def make_config() -> Callable[[ModelShape], PuzzleConfig]:
    """The config of the model that a shape describes."""
    return _config_of


@pytest.fixture(scope="session")
def teacher_config(shape: ModelShape) -> PuzzleConfig:
    return _config_of(shape)


def _config_of(shape: ModelShape) -> PuzzleConfig:
    return PuzzleConfig.from_family(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=shape.tied_embeddings,
            attention_bias=shape.qkv_bias,
            mlp_bias=shape.mlp_bias,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
