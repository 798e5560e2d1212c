"""Does a runtime compute what the student does? A random student with every kind of variant that the runtime takes,
first and last layer included, one of each other family that it reads, and the bundled teacher are written for it, in
fp32, and checked in the runtime's own environment.

    python benchmarks/verify_runtimes.py mlx-lm --python /venvs/mlx/bin/python
    python benchmarks/verify_runtimes.py llama.cpp --python /venvs/llama/bin/python     # needs puzzle-nas[gguf] here
    python benchmarks/verify_runtimes.py vllm --python /venvs/vllm/bin/python
    python benchmarks/verify_runtimes.py vllm-plugin --python /venvs/vllm/bin/python    # needs puzzle-nas there

``--save`` writes what was found to ``benchmarks/results/verify_RUNTIME.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import environment
from transformers import CONFIG_MAPPING

from puzzle import build
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.export.publish import FORMATS
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.types import Format

Blocks = list[tuple[dict[str, Any], dict[str, Any]]]

RESULTS = Path(__file__).parent / "results"
KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, GQA_1 = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "gqa", "num_kv_heads": 1}
NARROW = {"kind": "narrow", "intermediate_size": 40}
WIDE = {"kind": "narrow", "intermediate_size": 300}  # as of several FFNs fused into one
WINDOW, NARROWER = {"kind": "window", "window_tokens": 37}, {"kind": "window", "window_tokens": 11}
EXPERTS, ACTIVE = {"kind": "experts", "num_experts": 3}, {"kind": "active", "num_active_experts": 1}
BLOCKS = [(SKIP, KEEP), (GQA, NARROW), (LINEAR, LINEAR), (KEEP, SKIP), (SKIP, LINEAR), (SKIP, SKIP), (GQA, KEEP)]
BLOCKS += [(LINEAR, SKIP), (SKIP, SKIP)]
STOCK_VLLM = [(WINDOW, KEEP), (GQA, NARROW), (SKIP, KEEP), (KEEP, SKIP), (GQA_1, WIDE), (SKIP, SKIP), (WINDOW, NARROW)]
STOCK_VLLM += [(GQA_1, SKIP), (SKIP, KEEP)]
PLUGIN = [*BLOCKS[:-1], (GQA_1, WIDE), (WINDOW, KEEP), (NARROWER, LINEAR), (LINEAR, NARROW), (GQA_1, SKIP)]
PLUGIN += [(SKIP, SKIP)]
OTHER_FAMILY = [(SKIP, KEEP), (GQA_1, NARROW), (NARROWER, LINEAR), (KEEP, KEEP)]
MOE = [(SKIP, KEEP), (GQA_1, NARROW), (NARROWER, EXPERTS), (KEEP, ACTIVE)]
FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = {"sliding_window": 50, "layer_types": [SLIDING, FULL, SLIDING, SLIDING]}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# fields of its config, so that what a family has matters
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {**LLAMA3, "rope_theta": 1000.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 50, "rope_parameters": {**YARN, "rope_theta": 1000.0}},
    "ministral": {"head_dim": 32, **TYPES},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "attention_bias": True},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        **TYPES,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


@dataclass(frozen=True)
class Case:
    """What a runtime is given. ``num_greedy``: tokens made greedily, which it must make, too."""

    target: Format
    blocks: Blocks
    hidden_size: int = 64
    num_tokens: int = 24
    num_greedy: int = 0
    others: Mapping[str, Blocks] = field(default_factory=dict)

    def students(self) -> Mapping[str, Blocks]:
        """By family."""
        return {"llama": self.blocks, **self.others}


OTHERS = {**dict.fromkeys(("mistral", "ministral", "qwen2", "qwen3", "gemma3_text"), OTHER_FAMILY), "qwen3_moe": MOE}
# vLLM's CPU attention has heads of 32 channels or more, and its cache blocks of 128 tokens: several, and windows slide
CASES = {
    "mlx-lm": Case("mlx", BLOCKS),
    "llama.cpp": Case("gguf", BLOCKS),
    "vllm": Case("nemotron-nas", STOCK_VLLM, 128, 200, 64),
    "vllm-plugin": Case("hf", PLUGIN, 128, 200, 64, OTHERS),
}


def make_student(folder: Path, family: str, layers: Blocks, hidden_size: int) -> None:
    """Weights large enough that attention is far from uniform, and the bundled teacher's tokenizer."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=2048,
        max_position_embeddings=512,
        initializer_range=1.6 * hidden_size**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **FAMILIES[family],
    )
    blocks = [{"attention": attention, "ffn": ffn} for attention, ffn in layers]
    model = PuzzleForCausalLM(PuzzleConfig.from_family(config, blocks)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # else all alike
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    folder.mkdir()
    build.write_model(model, folder, torch.float32)
    for file in DEMO_TEACHER.glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=[*CASES])
    parser.add_argument("--python", type=Path, help="of the environment that the runtime is in")
    parser.add_argument("--save", action="store_true", help="write the result file")
    options = parser.parse_args()
    case, verdicts = CASES[options.runtime], {}
    with tempfile.TemporaryDirectory() as name:
        models = {f"{family}, every variant": Path(name) / family for family in case.students()}
        for family, blocks in case.students().items():
            make_student(Path(name) / family, family, blocks, case.hidden_size)
        for label, model in {**models, "bundled teacher": DEMO_TEACHER}.items():
            out = Path(name) / f"out-{model.name}"
            FORMATS[case.target](Source.open(model), model, out, "F32")
            write_reference(model, out / REFERENCE, True, model, 2, case.num_tokens, case.num_greedy)
            verdicts[label] = verify(out, options.runtime, options.python)
            print(f"{label}: {verdicts[label].line()}", flush=True)
    if options.save:
        found = {label: verdict.differences for label, verdict in verdicts.items()}
        version = next(iter(verdicts.values())).version
        result = {"environment": environment(), "runtime": f"{options.runtime} {version}", "differences": found}
        (RESULTS / f"verify_{options.runtime}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(verdict.passed for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
