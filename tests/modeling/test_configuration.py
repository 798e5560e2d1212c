"""The configuration of every family: nothing lost, nothing that transformers would misread, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from puzzle.modeling import FAMILIES, PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.configuration_puzzle import FULL, LAYER_FIELDS, SLIDING
from tests.tiny_families import COMMON, OWN, make_kept, make_stock, make_tokens

KEEP = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_config(family: str, **fields: Any) -> Any:
    return CONFIG_MAPPING[family](**{**COMMON, **OWN[family], **fields})


@every_family
def test_a_family_s_config_survives_the_way_through_ours(family: str, tmp_path: Path) -> None:
    given = family_config(family, dtype="bfloat16", eos_token_id=[5, 6])
    config = PuzzleConfig.from_family(given)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PuzzleConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    for one in (config, loaded):
        assert {**one.family_config().to_dict(), "_name_or_path": ""} == given.to_dict()


@every_family
def test_transformers_finds_no_layers_to_build_a_cache_from(family: str) -> None:
    """A cache's slots are the attention layers, so what a family says of its layers must not be taken for its slots."""
    config = PuzzleConfig.from_family(family_config(family))
    assert not any(hasattr(config, name) for name in LAYER_FIELDS)
    by_type = {"rope_parameters"} if family == "gemma3_text" else set()
    assert set(config.teacher_layers or {}) <= {*LAYER_FIELDS} | by_type
    assert hasattr(config, "rope_parameters") == (not by_type)


def test_gemma_s_two_ropes_are_written_in_the_old_form_too(tmp_path: Path) -> None:
    ropes = {
        FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    }
    PuzzleConfig.from_family(family_config("gemma3_text")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["teacher_layers"]["rope_parameters"] == ropes
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (5000.0, 100.0)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@torch.no_grad()
def test_gemma_s_config_as_it_was_first_published() -> None:
    old = {
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "layer_types": None,
        "rope_parameters": None,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    stock = make_stock("gemma3_text", **old)
    kept, tokens = make_kept(stock), make_tokens(2, 15)
    assert [kept.config.own_window(layer) for layer in range(4)] == [5, None, 5, None]
    assert torch.equal(kept(tokens).logits, stock(tokens).logits)
    assert torch.equal(kept(tokens).logits, make_kept(make_stock("gemma3_text"))(tokens).logits)


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"original_max_position_embeddings": 32, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@every_family
@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_every_scaled_rope_is_transformers_own(family: str, kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1000.0, **ROPES[kind]}
    if family == "gemma3_text":
        if kind == "longrope":
            pytest.skip("releases before 5.23 fail in their own Gemma 3")
        rope = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}
    stock = make_stock(family, rope_parameters=rope, head_dim=16)
    if family == "qwen2":  # has no head size of its own
        stock = make_stock(family, rope_parameters=rope, hidden_size=64)
    kept, tokens = make_kept(stock), make_tokens(1, 40)
    assert torch.equal(kept(tokens).logits, stock(tokens).logits)
    kept.save_pretrained(tmp_path)
    loaded = PuzzleForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, kept(tokens).logits)


@every_family
def test_layers_can_be_stacked_anew(family: str) -> None:
    config = PuzzleConfig.from_family(family_config(family))
    layers = [3, 0, 0, 1, 2, 1]
    stacked = config.with_layers(layers, [KEEP] * 6)
    for new, old in enumerate(layers):
        assert stacked.own_window(new) == config.own_window(old)
        assert stacked.layer_type(new) == config.layer_type(old)
        assert stacked.has_experts(new) == config.has_experts(old)
        assert stacked.experts(new) == config.experts(old)
    assert config.num_hidden_layers == 4


def test_experts_need_not_be_in_every_layer() -> None:
    config = PuzzleConfig.from_family(family_config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]))
    assert [config.has_experts(layer) for layer in range(4)] == [False, True, False, False]
    assert [config.experts(layer) for layer in range(4)] == [None, (6, 2), None, None]
    assert [config.ffn_width(layer) for layer in range(4)] == [40, None, 40, 40]
    fewer = PuzzleConfig.from_family(
        family_config("qwen3_moe"),
        [{**KEEP, "ffn": ffn} for ffn in ({"kind": "experts", "num_experts": 1}, {"kind": "keep"})]
        + [{**KEEP, "ffn": ffn} for ffn in ({"kind": "active", "num_active_experts": 1}, {"kind": "linear"})],
    )
    assert [fewer.experts(layer) for layer in range(4)] == [(1, 1), None, (6, 1), None]


@pytest.mark.parametrize(
    ("family", "layer", "part", "spec", "message"),
    [
        (
            "mistral",
            1,
            "attention",
            {"kind": "window"},
            "layer 1, attention: kind 'window' has the fields .*window_tokens",
        ),
        (
            "llama",
            0,
            "attention",
            {"kind": "window", "window_tokens": 0},
            "layer 0, attention: window_tokens .*positive",
        ),
        (
            "llama",
            0,
            "attention",
            {"kind": "window", "window_tokens": 3, "sink_tokens": 0},
            "layer 0, attention: sink_tokens .*positive",
        ),
        ("llama", 0, "attention", {"kind": "keep", "sink_tokens": 1}, "kind 'keep' has the fields"),
        (
            "gemma3_text",
            2,
            "attention",
            {"kind": "window", "window_tokens": 6},
            "layer 2, attention: the teacher's attention sees 5 tokens only, fewer than 6",
        ),
        (
            "qwen3_moe",
            0,
            "ffn",
            {"kind": "narrow", "intermediate_size": 8},
            "layer 0, ffn: kind 'narrow' .*has experts",
        ),
        ("qwen3_moe", 1, "ffn", {"kind": "experts", "num_experts": 2}, "layer 1, ffn: .*has 0 experts there"),
        (
            "qwen3_moe",
            2,
            "ffn",
            {"kind": "experts", "num_experts": 7},
            "num_experts = 7, and the teacher has 6 experts",
        ),
        ("qwen2", 2, "ffn", {"kind": "active", "num_active_experts": 1}, "has 0 experts there"),
    ],
)
def test_blocks_that_a_layer_cannot_have(
    family: str, layer: int, part: str, spec: dict[str, Any], message: str
) -> None:
    blocks = [{**KEEP, part: spec} if index == layer else KEEP for index in range(4)]
    with pytest.raises(ValueError, match=message):
        PuzzleConfig.from_family(family_config(family), blocks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"layer_types": [FULL, FULL, FULL, "chunked_attention"]}, "chunked_attention is not supported"),
    ],
)
def test_what_this_model_does_not_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PuzzleConfig.from_family(family_config("gemma3_text", **fields))
