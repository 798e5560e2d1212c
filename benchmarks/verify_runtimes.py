"""Does a runtime compute what the student does? A random student with every kind of variant that the runtime takes,
first and last layer included, and the bundled teacher are written for it, in fp32, and checked in the runtime's own
environment.

    python benchmarks/verify_runtimes.py mlx-lm --python /venvs/mlx/bin/python
    python benchmarks/verify_runtimes.py llama.cpp --python /venvs/llama/bin/python     # needs puzzle-nas[gguf] here
    python benchmarks/verify_runtimes.py vllm --python /venvs/vllm/bin/python
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from puzzle import build
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.export.publish import FORMATS
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.types import Format

KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, GQA_1 = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "gqa", "num_kv_heads": 1}
NARROW = {"kind": "narrow", "intermediate_size": 40}
WIDE = {"kind": "narrow", "intermediate_size": 300}  # as of several FFNs fused into one
WINDOW = {"kind": "window", "window_tokens": 37}
BLOCKS = [(SKIP, KEEP), (GQA, NARROW), (LINEAR, LINEAR), (KEEP, SKIP), (SKIP, LINEAR), (SKIP, SKIP), (GQA, KEEP)]
BLOCKS += [(LINEAR, SKIP), (SKIP, SKIP)]
STOCK_VLLM = [(WINDOW, KEEP), (GQA, NARROW), (SKIP, KEEP), (KEEP, SKIP), (GQA_1, WIDE), (SKIP, SKIP), (WINDOW, NARROW)]
STOCK_VLLM += [(GQA_1, SKIP), (SKIP, KEEP)]
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Case:
    """What a runtime is given. ``num_greedy``: tokens made greedily, which it must make, too."""

    target: Format
    blocks: list[tuple[dict[str, Any], dict[str, Any]]]
    hidden_size: int = 64
    num_tokens: int = 24
    num_greedy: int = 0


# vLLM's CPU attention has heads of 32 channels or more, and its cache blocks of 128 tokens: several, and windows slide
CASES = {
    "mlx-lm": Case("mlx", BLOCKS),
    "llama.cpp": Case("gguf", BLOCKS),
    "vllm": Case("nemotron-nas", STOCK_VLLM, 128, 200, 64),
}


def make_student(folder: Path, case: Case) -> None:
    """Weights large enough that attention is far from uniform, and the bundled teacher's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden_size,
        num_hidden_layers=len(case.blocks),
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=2048,
        max_position_embeddings=512,
        initializer_range=1.6 * case.hidden_size**-0.5,
        rope_parameters={**SCALED, "rope_theta": 1000.0, "original_max_position_embeddings": 16},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    blocks = [{"attention": attention, "ffn": ffn} for attention, ffn in case.blocks]
    model = PuzzleForCausalLM(PuzzleConfig.from_family(config, blocks))
    folder.mkdir()
    build.write_model(model, folder, torch.float32)
    for file in DEMO_TEACHER.glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=[*CASES])
    parser.add_argument("--python", type=Path, help="of the environment that the runtime is in")
    options = parser.parse_args()
    case, passed = CASES[options.runtime], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_student(folder / "student", case)
        for label, model in (("every variant", folder / "student"), ("bundled teacher", DEMO_TEACHER)):
            out = folder / f"out-{model.name}"
            FORMATS[case.target](Source.open(model), model, out, "F32")
            write_reference(model, out / REFERENCE, True, model, 2, case.num_tokens, case.num_greedy)
            verdict = verify(out, options.runtime, options.python)
            print(f"{label}: {verdict.line()}")
            passed &= verdict.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
