"""Does a runtime compute what the student does? A random student with every kind of variant, first and last layer
included, and the bundled teacher are written for it, in fp32, and checked in the runtime's own environment.

    python benchmarks/verify_runtimes.py mlx-lm --python /venvs/mlx/bin/python
    python benchmarks/verify_runtimes.py llama.cpp --python /venvs/llama/bin/python     # needs puzzle-nas[gguf] here
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig

from puzzle import build
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.export.publish import FORMATS
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.types import Format

FORMAT_OF: dict[str, Format] = {"mlx-lm": "mlx", "llama.cpp": "gguf"}
KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, NARROW = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "narrow", "intermediate_size": 40}
BLOCKS = [(SKIP, KEEP), (GQA, NARROW), (LINEAR, LINEAR), (KEEP, SKIP), (SKIP, LINEAR), (SKIP, SKIP), (GQA, KEEP)]
BLOCKS += [(LINEAR, SKIP), (SKIP, SKIP)]
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def make_student(folder: Path) -> None:
    """Weights large enough that attention is far from uniform, and the bundled teacher's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=len(BLOCKS),
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=2048,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters={**SCALED, "rope_theta": 1000.0, "original_max_position_embeddings": 16},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    blocks = [{"attention": attention, "ffn": ffn} for attention, ffn in BLOCKS]
    model = PuzzleForCausalLM(PuzzleConfig.from_family(config, blocks))
    folder.mkdir()
    build.write_model(model, folder, torch.float32)
    for file in DEMO_TEACHER.glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=[*FORMAT_OF])
    parser.add_argument("--python", type=Path, help="of the environment that the runtime is in")
    options = parser.parse_args()
    target, passed = FORMAT_OF[options.runtime], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_student(folder / "student")
        for label, model in (("every variant", folder / "student"), ("bundled teacher", DEMO_TEACHER)):
            out = folder / f"out-{model.name}"
            FORMATS[target](Source.open(model), model, out, "F32")
            write_reference(model, out / REFERENCE, tokenizer_dir=model)
            verdict = verify(out, options.runtime, options.python)
            print(f"{label}: {verdict.line()}")
            passed &= verdict.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
