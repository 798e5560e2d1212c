"""What of vLLM's plugin needs no vLLM: that it is found, and what it refuses. For the rest: make verify-vllm."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig

from puzzle import modeling, vllm_plugin
from puzzle.modeling import PuzzleConfig

ROOT = Path(__file__).parent.parent
KEEP, SKIP = {"kind": "keep"}, {"kind": "skip"}


def test_vllm_finds_the_class_of_what_exports_name(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["puzzle"].split(":")
    registered: dict[str, str] = {}
    engine: Any = ModuleType("vllm")
    engine.ModelRegistry = type("Registry", (), {"register_model": registered.__setitem__})
    monkeypatch.setitem(sys.modules, "vllm", engine)
    getattr(importlib.import_module(module), function)()
    ((architecture, found),) = registered.items()
    assert architecture == modeling.PuzzleForCausalLM.__name__
    file, name = found.split(":")
    nodes = ast.parse((ROOT / f"{file.replace('.', '/')}.py").read_text()).body
    assert name in {node.name for node in nodes if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "window", "window_tokens": 5, "sink_tokens": 2}, "layer 1: a window with 2 sinks.*serve_on"),
        ({"kind": "gqa", "num_kv_heads": 3}, "layer 1: 3 KV heads do not divide among 2 devices"),
        (SKIP, "no layer has attention: search with layers_with_attention"),
    ],
)
def test_what_vllm_cannot_run_is_named(attention: dict[str, Any], message: str) -> None:
    family = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=2)

    def config(*attentions: dict[str, Any]) -> PuzzleConfig:
        return PuzzleConfig.from_family(family, [{"attention": one, "ffn": KEEP} for one in attentions])

    with pytest.raises(ValueError, match=message):
        vllm_plugin.check(config(SKIP, attention), 2)
    vllm_plugin.check(config(SKIP, KEEP), 2)
    vllm_plugin.check(config(SKIP, {"kind": "gqa", "num_kv_heads": 1}), 2)  # each device has it
