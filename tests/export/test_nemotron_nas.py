"""What readers make of the config: their own formulas, applied to it; and what is refused, with the layer's name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

import puzzle.export
from puzzle.capabilities import stored_width
from puzzle.export.nemotron_nas import (
    CONFIG_CODE,
    block_configs,
    check_vllm,
    ffn_mult,
    nemotron_nas_config,
    read_width,
)
from puzzle.types import Architecture, AttentionSpec, ConfigError, FfnSpec, ModelShape

SHAPE = ModelShape("llama", 4, 512, 8, 8, 64, 1536, 4096, 2048, tied_embeddings=False)
TEACHER = LlamaConfig(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    head_dim=64,
    vocab_size=4096,
    bos_token_id=1,
    eos_token_id=[2, 3],
).to_dict()
KEEP, SKIP = (AttentionSpec("keep"), FfnSpec("keep")), (AttentionSpec("skip"), FfnSpec("skip"))
MIXED: Architecture = (
    KEEP,
    (AttentionSpec("gqa", 2), FfnSpec("narrow", 768)),
    (AttentionSpec("skip"), FfnSpec("narrow", 300)),
    (AttentionSpec("gqa", 1), FfnSpec("skip")),
    SKIP,
)


def reader_width(multiplier: float, hidden_size: int) -> int:
    """vLLM's and llama.cpp's own arithmetic."""
    width = int(2 * multiplier * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden_size", [24, 256, 512, 2560, 4096, 5120, 8192, 16384])
def test_every_width_is_read_as_it_is_stored(hidden_size: int) -> None:
    for width in (1, 96, 256, 257, 2816, 4608, 14336, 28672, 28673, 53248):
        multiplier = json.loads(json.dumps(ffn_mult(width, hidden_size)))
        assert reader_width(multiplier, hidden_size) == read_width(multiplier, hidden_size) == stored_width(width)
        assert 0 <= stored_width(width) - width < 256
        for rounded in (round(multiplier, 3), float(f"{multiplier:.5g}")):  # as some tools write floats
            assert hidden_size > 8192 or reader_width(rounded, hidden_size) == stored_width(width)


def test_block_configs_are_what_readers_take() -> None:
    blocks = block_configs(SHAPE, MIXED)
    attention = [block["attention"] for block in blocks]
    assert [entry["n_heads_in_group"] for entry in attention] == [1, 4, None, 8, None]
    assert [entry["no_op"] for entry in attention] == [False, False, True, False, True]
    ffn = [block["ffn"] for block in blocks]
    widths = [None if entry["no_op"] else reader_width(entry["ffn_mult"], 512) for entry in ffn]
    assert widths == [1536, 768, 512, None, None]
    assert not any(entry["replace_with_linear"] for entry in attention + ffn)


def test_linear_maps_are_written_though_vllm_refuses_them() -> None:
    layers = (KEEP, (AttentionSpec("linear"), FfnSpec("linear")))
    block = block_configs(SHAPE, layers)[1]
    assert block["attention"] == {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True}
    assert block["ffn"] == {"ffn_mult": None, "no_op": False, "replace_with_linear": True}
    with pytest.raises(ConfigError, match="layer 1: vLLM cannot load attention linear"):
        check_vllm(SHAPE, layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((KEEP, (AttentionSpec("keep"), FfnSpec("linear"))), "layer 1: vLLM cannot load ffn linear"),
        ((SKIP, KEEP), "layer 0: vLLM cannot load attention skip.*attention in the first layer"),
        ((), "layer 0"),
        (
            (KEEP, (AttentionSpec("window", window_tokens=64), FfnSpec("keep"))),
            "layer 1: .* attention window-64 .*no w",
        ),
        ((KEEP, (AttentionSpec("gqa", 3), FfnSpec("keep"))), "layer 1: .* attention gqa-3 .*3 does not divide 8"),
    ],
)
def test_what_vllm_cannot_take_is_refused_by_layer_and_variant(layers: Architecture, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_vllm(SHAPE, layers)
    check_vllm(SHAPE, MIXED)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (KEEP, (AttentionSpec("window", window_tokens=64, sink_tokens=4), FfnSpec("keep"))),
            "layer 1: attention window-64-sinks-4 cannot be .*no sinks",
        ),
        (((AttentionSpec("keep"), FfnSpec("active", None, 4, 2)),), "layer 0: ffn active-2 cannot .*no experts"),
    ],
)
def test_what_the_format_has_no_word_for_is_refused(layers: Architecture, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_configs(SHAPE, layers)


def test_other_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="a qwen3 model cannot be written as nemotron-nas.*llama, mistral"):
        nemotron_nas_config(TEACHER, replace(SHAPE, family="qwen3"), MIXED, "bfloat16")
    windows: tuple[int | None, ...] = (256,) * 4
    with pytest.raises(ConfigError, match="mistral model with sliding windows"):
        nemotron_nas_config(TEACHER, replace(SHAPE, family="mistral", windows=windows), MIXED, "bfloat16")
    nemotron_nas_config(TEACHER, replace(SHAPE, family="mistral"), MIXED, "bfloat16")
    with pytest.raises(ConfigError, match="silu only, and the teacher has 'gelu'"):
        nemotron_nas_config({**TEACHER, "hidden_act": "gelu"}, SHAPE, MIXED, "bfloat16")


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, None),
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, LLAMA3),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope_is_written_in_both_forms(given: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    teacher = {name: value for name, value in TEACHER.items() if not name.startswith("rope")}
    config = nemotron_nas_config({**teacher, **given}, SHAPE, MIXED, "bfloat16")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}


def test_the_config_loads_with_attributes_and_survives_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = nemotron_nas_config(TEACHER, SHAPE, MIXED, "bfloat16")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(Path(next(iter(puzzle.export.__path__)), f"{CONFIG_CODE}.py"), folder)
    loaded: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert loaded.model_type == "nemotron-nas" and loaded.num_hidden_layers == 5 and loaded.eos_token_id == [2, 3]
    assert [block.attention.n_heads_in_group for block in loaded.block_configs] == [1, 4, None, 8, None]
    assert not hasattr(loaded.block_configs[0].ffn, "intermediate_size")  # vLLM asks for what may not be there
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"] == config["block_configs"]
