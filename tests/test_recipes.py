"""The recipes that are shipped, on the config.json of their teachers alone: the published sizes, and what they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from puzzle import yamlfiles
from puzzle.cli import main
from puzzle.config import RunConfig
from puzzle.run import Run
from puzzle.variants import model_params

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NEMO_12B: dict[str, Any] = {
    **LLAMA_8B,
    "model_type": "mistral",
    "hidden_size": 5120,
    "head_dim": 128,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
    "sliding_window": None,
}
# teacher, its parameters, the student's, and what was published in billions
RECIPES: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "minitron-4b-width": (LLAMA_8B, 8_030_261_248, 4_512_746_496, 4.5),
    "minitron-4b-depth": (LLAMA_8B, 8_030_261_248, 4_540_469_248, 4.5),
    "mn-minitron-8b": (NEMO_12B, 12_247_782_400, 8_414_105_600, 8.4),
}


LLAMA_70B: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}


def test_all_recipes_are_here() -> None:
    shipped = {path.stem for path in (yamlfiles.shipped_inputs() / yamlfiles.RECIPES).glob("*.yaml")}
    assert shipped == {*RECIPES, "nemotron-51b"}


def test_a_search_says_what_its_limits_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert main(["--debug", "run", "nemotron-51b", "--set", f"teacher={tmp_path}", "--device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1200 items at 160 sites, 880 units to train" in out
    assert "chat.total_tok_per_s" in out and "estimate" in out
    assert "before it can run:" in out and "GPU-hours" in out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_to_the_published_size(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, teacher, student, billions = RECIPES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = [name, "--set", f"teacher={tmp_path}", "--device", "cpu"]
    assert main(["--debug", "run", *asked, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{teacher:,}" in out
    assert f"{student:,}" in out
    assert "GPU-hours" in out
    assert round(student / 1e9, 1) == billions
    shape = (run := Run.open(Path(name), [f"teacher={tmp_path}"])).student_shape
    assert model_params(run.shape) == teacher
    config = {**config, "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    stock = CONFIG_MAPPING[config["model_type"]](**{**config, "num_hidden_layers": shape.num_layers, "head_dim": 128})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(stock)
    assert sum(parameter.numel() for parameter in model.parameters()) == student
    settings = yamlfiles.load(RunConfig, yamlfiles.locate_config(Path(name)))
    assert (settings.kd.cosine_weight, settings.kd.lm_weight, settings.kd.divergence) == (0, 0, "forward")
