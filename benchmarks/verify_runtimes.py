"""Does a runtime compute what the student does? A random student with every kind of variant, first and last layer
included, and the bundled teacher are written for it, in fp32, and checked in the runtime's own environment: logits, 64
greedy tokens and, where the tokenizer is part of the format, the tokens of the bundled held-out text. For llama.cpp the
teacher is written as Q8_0, too, and its CE on that text is told.

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
from safetensors.torch import load_file
from transformers import LlamaConfig

from puzzle import build
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.config import SourceConfig
from puzzle.data.source import documents
from puzzle.export.gguf import GgufType
from puzzle.export.publish import FORMATS
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import load_tokenizer
from puzzle.types import Format

FORMAT_OF: dict[str, Format] = {"mlx-lm": "mlx", "llama.cpp": "gguf"}
KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, NARROW = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "narrow", "intermediate_size": 40}
BLOCKS = [(SKIP, KEEP), (GQA, NARROW), (LINEAR, LINEAR), (KEEP, SKIP), (SKIP, LINEAR), (SKIP, SKIP), (GQA, KEEP)]
BLOCKS += [(LINEAR, SKIP), (SKIP, SKIP)]
SEQUENCES, TOKENS, TEXT_CHARACTERS, NUM_GREEDY = 16, 256, 200_000, 64
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


def held_out() -> tuple[str, torch.Tensor]:
    """The bundled text of the report split; its first tokens in sequences."""
    own = [str(document.content) for document in documents(SourceConfig(path="demo")) if document.split == "report"]
    text = "\n".join(own)[:TEXT_CHARACTERS]
    ids = load_tokenizer(DEMO_TEACHER)(text, add_special_tokens=False).input_ids
    return text, torch.tensor(ids[: SEQUENCES * TOKENS]).view(SEQUENCES, TOKENS)


def checked(label: str, model: Path, out: Path, runtime: str, python: Path | None, gguf_type: GgufType = "F32") -> bool:
    """Prints what the runtime makes of the model as it is written for it."""
    text, tokens = held_out()
    FORMATS[FORMAT_OF[runtime]](Source.open(model), model, out, gguf_type)
    own_text = {} if model != DEMO_TEACHER else {"tokens": tokens}
    write_reference(model, out / REFERENCE, gguf_type == "F32", model, **own_text, text=text, num_greedy=NUM_GREEDY)
    verdict = verify(out, runtime, python)
    reference = load_file(out / REFERENCE)
    print(f"{label}: {verdict.line()}")
    print(f"  {NUM_GREEDY} greedy tokens: {verdict.differences['greedy_tokens_unlike']:.0f} others")
    if "tokens_of_text_unlike" in verdict.differences:
        unlike = verdict.differences["tokens_of_text_unlike"]
        print(f"  {len(reference['text_ids']):,} tokens of held-out text: {unlike:.0f} others")
    if own_text and "ce_change_nats" in verdict.differences:
        logits, ids = reference["logits"][:, :-1], reference["input_ids"][:, 1:]
        ce = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))
        change = verdict.differences["ce_change_nats"]
        print(f"  CE on {ids.numel():,} of its tokens: {ce + change:.4f} nats ({change:+.4f} against {ce:.4f})")
    return verdict.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=[*FORMAT_OF])
    parser.add_argument("--python", type=Path, help="of the environment that the runtime is in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, asked = Path(name), (options.runtime, options.python)
        make_student(folder / "student")
        passed = [
            checked("every variant", folder / "student", folder / "every", *asked),
            checked("bundled teacher", DEMO_TEACHER, folder / "teacher", *asked),
        ]
        if options.runtime == "llama.cpp":
            passed.append(checked("bundled teacher, Q8_0", DEMO_TEACHER, folder / "q8", *asked, "Q8_0"))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
