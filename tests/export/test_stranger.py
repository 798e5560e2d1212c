"""A student of the bundled teacher with every kind of variant, run in every way where puzzle is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from puzzle.checkpoint import DEMO_TEACHER
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import Compute, load_config, load_model, load_tokenizer
from tests.exporting import export_hf

SCRIPT = Path(__file__).with_name("stranger.py")
KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, WINDOW = {"kind": "gqa", "num_kv_heads": 1}, {"kind": "window", "window_tokens": 6}
SINKS, NARROW = {**WINDOW, "sink_tokens": 2}, {"kind": "narrow", "intermediate_size": 320}
BLOCKS = [(SKIP, KEEP), (GQA, NARROW), (LINEAR, LINEAR), (WINDOW, SKIP), (SKIP, SKIP), (SINKS, KEEP), (KEEP, NARROW)]
BLOCKS += [(LINEAR, SKIP)]


def make_student(blocks: list[Any]) -> PuzzleForCausalLM:
    """With the teacher's weights wherever they fit."""
    torch.manual_seed(0)
    teacher = load_model(DEMO_TEACHER, Compute(torch.device("cpu"), bf16=False))
    entries = [{"attention": attention, "ffn": ffn} for attention, ffn in blocks]
    model = PuzzleForCausalLM(PuzzleConfig.from_family(load_config(DEMO_TEACHER).family_config(), entries)).eval()
    own, given = model.state_dict(), teacher.state_dict()
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return model


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Of a new environment with every package that is installed here, but puzzle."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for path in {sysconfig.get_path(name) for name in ("purelib", "platlib")}:
        for entry in Path(path).iterdir():
            if not entry.name.startswith(("puzzle", "_editable", "__editable")):
                (packages / entry.name).symlink_to(entry)
    return tmp_path / "venv" / "bin" / "python"


@torch.no_grad()
def test_where_puzzle_is_not_installed(python: Path, tmp_path: Path) -> None:
    tokens = load_tokenizer(DEMO_TEACHER)(
        "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x = 0\n" * 2
    ).input_ids
    ids = torch.tensor([tokens[:20], tokens[3:23]])
    expected = {"tokens": ids}
    for name, blocks in (("mixed", BLOCKS), ("uniform", [(GQA, NARROW)] * len(BLOCKS))):
        student = make_student(blocks)
        export_hf(student, DEMO_TEACHER, tmp_path / name)
        expected[name] = student(ids).logits
    save_file(expected, tmp_path / "expected.safetensors")
    folders = [str(tmp_path / name) for name in ("mixed", "uniform", "expected.safetensors", "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-I", str(SCRIPT), *folders]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])

    assert found["puzzle"] is False and "puzzle" in sys.modules
    assert found["code"] == ["transformers_modules", "PuzzleForCausalLM"]
    assert found["text"] == load_tokenizer(DEMO_TEACHER)("def f(x):").input_ids
    for name in ("reload", "compiled", "device_map", "lora, before", "saved", "uniform"):
        assert found[name] <= 1e-5, name
    assert found["chunks"] <= 1e-4 and found["checkpointing"] <= 1e-4
    assert found["devices"] == ["cpu", "disk"]
    ways = {name: unlike for name, unlike in found.items() if name.startswith("tokens: ")}
    assert len(ways) == 12 and not any(ways.values()), ways
    assert found["lora, losses"][-1] < 0.9 * found["lora, losses"][0]
    assert found["lora, moved"] > 0.1 and found["lora, merged"] <= 1e-3
    assert found["uniform, code"] == ["transformers", "LlamaForCausalLM"] and not found["uniform, python files"]
