"""The exported student trains on in the ecosystem: LoRA (PEFT), SFT and DPO (TRL), in a process without puzzle."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.export.test_hf import MIXED, make_student
from tests.exporting import export_hf

SCRIPT = Path(__file__).parent / "trains_on.py"
MISSING = [name for name in ("trl", "peft", "datasets", "accelerate") if importlib.util.find_spec(name) is None]
GATED = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
ADAPTED = {0: GATED, 1: [*ATTENTION, *GATED], 2: ["self_attn.linear_attn", "mlp.linear_mlp"], 3: ATTENTION}  # of MIXED


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install trl peft")
@pytest.mark.parametrize("method", ["sft", "lora", "dpo"])
def test_the_exported_student_trains_on(
    method: str, tiny_llama: LlamaForCausalLM, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    export_hf(make_student(tiny_llama, MIXED), tiny_tokenizer_dir, tmp_path / "hf")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "hf"), method, str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["puzzle"] == []
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert found["difference"] < 1e-4
    if method == "sft":
        assert "modeling_puzzle.py" in os.listdir(tmp_path / "out")  # what was trained loads elsewhere, too
        return
    adapted = {name.removeprefix("base_model.model.model.layers.").split(".lora_")[0] for name in found["trained"]}
    assert adapted == {f"{layer}.{name}" for layer, names in ADAPTED.items() for name in names}
