"""Does a runtime compute what the student does? A random student with every kind of variant that the runtime takes,
first and last layer included, one of each other family that it reads, and the bundled teacher are written for it, in
fp32, and checked in the runtime's own environment: logits, 64 greedy tokens and, where the tokenizer is part of the
format, the tokens of the bundled held-out text. For llama.cpp the teacher is written as Q8_0, too, and its CE on that
text is told.

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
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from puzzle import build
from puzzle.checkpoint import DEMO_TEACHER
from puzzle.config import SourceConfig
from puzzle.data.source import documents
from puzzle.export.gguf import GgufType
from puzzle.export.publish import FORMATS
from puzzle.export.source import Source
from puzzle.export.verify import REFERENCE, Verdict, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import load_tokenizer
from puzzle.types import Format

Blocks = list[tuple[dict[str, Any], dict[str, Any]]]

RESULTS = Path(__file__).parent / "results"
SEQUENCES, TOKENS, TEXT_CHARACTERS, NUM_GREEDY = 16, 256, 200_000, 64
GREEDY = ("greedy_tokens_unlike", "tokens_unlike_without_cache")  # what a runtime's script calls those that differ
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
    """What a runtime is given."""

    target: Format
    blocks: Blocks
    hidden_size: int = 64
    num_tokens: int = 24
    others: Mapping[str, Blocks] = field(default_factory=dict)

    def students(self) -> Mapping[str, Blocks]:
        """By family."""
        return {"llama": self.blocks, **self.others}


OTHERS = {**dict.fromkeys(("mistral", "ministral", "qwen2", "qwen3", "gemma3_text"), OTHER_FAMILY), "qwen3_moe": MOE}
# vLLM's CPU attention has heads of 32 channels or more, and its cache blocks of 128 tokens: several, and windows slide
CASES = {
    "mlx-lm": Case("mlx", BLOCKS),
    "llama.cpp": Case("gguf", BLOCKS),
    "vllm": Case("nemotron-nas", STOCK_VLLM, 128, 200),
    "vllm-plugin": Case("hf", PLUGIN, 128, 200, OTHERS),
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


def held_out() -> tuple[str, torch.Tensor]:
    """The bundled text of the report split; its first tokens in sequences."""
    own = [str(document.content) for document in documents(SourceConfig(path="demo")) if document.split == "report"]
    text = "\n".join(own)[:TEXT_CHARACTERS]
    ids = load_tokenizer(DEMO_TEACHER)(text, add_special_tokens=False).input_ids
    return text, torch.tensor(ids[: SEQUENCES * TOKENS]).view(SEQUENCES, TOKENS)


def checked(label: str, model: Path, out: Path, options: argparse.Namespace, gguf_type: GgufType = "F32") -> Verdict:
    """Prints what the runtime makes of the model as it is written for it."""
    case, (text, tokens) = CASES[options.runtime], held_out()
    FORMATS[case.target](Source.open(model), model, out, gguf_type)
    if case.target != "gguf" or model != DEMO_TEACHER:  # only there a CE is asked for
        tokens = torch.randint(0, 2048, (2, case.num_tokens), generator=torch.Generator().manual_seed(0))
    write_reference(model, out / REFERENCE, gguf_type == "F32", model, tokens, text, NUM_GREEDY)
    verdict = verify(out, options.runtime, options.python)
    reference = load_file(out / REFERENCE)
    print(f"{label}: {verdict.line()}", flush=True)
    if verdict.differences:  # a runtime that leaves the greedy tokens out is no proof
        unlike = next(verdict.differences[name] for name in GREEDY if name in verdict.differences)
        print(f"  {NUM_GREEDY} greedy tokens: {unlike:.0f} others")
    if "tokens_of_text_unlike" in verdict.differences:
        unlike = verdict.differences["tokens_of_text_unlike"]
        print(f"  {len(reference['text_ids']):,} tokens of held-out text: {unlike:.0f} others")
    if "ce_change_nats" in verdict.differences and model == DEMO_TEACHER:
        logits, ids = reference["logits"][:, :-1], reference["input_ids"][:, 1:]
        ce = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))
        change = verdict.differences["ce_change_nats"]
        print(f"  CE on {ids.numel():,} of its tokens: {ce + change:.4f} nats ({change:+.4f} against {ce:.4f})")
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=[*CASES])
    parser.add_argument("--python", type=Path, help="of the environment that the runtime is in")
    parser.add_argument("--save", action="store_true", help="write the result file")
    options = parser.parse_args()
    case = CASES[options.runtime]
    with tempfile.TemporaryDirectory() as name:
        verdicts = {}
        for family, blocks in case.students().items():
            make_student(Path(name) / family, family, blocks, case.hidden_size)
            label = f"{family}, every variant"
            verdicts[label] = checked(label, Path(name) / family, Path(name) / f"out-{family}", options)
        label = "bundled teacher"
        verdicts[label] = checked(label, DEMO_TEACHER, Path(name) / "out-teacher", options)
        if case.target == "gguf":
            label += ", Q8_0"
            verdicts[label] = checked(label, DEMO_TEACHER, Path(name) / "out-q8", options, "Q8_0")
    if options.save:
        found = {label: verdict.differences for label, verdict in verdicts.items()}
        version = next(iter(verdicts.values())).version
        result = {"environment": environment(), "runtime": f"{options.runtime} {version}", "differences": found}
        (RESULTS / f"verify_{options.runtime}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(verdict.status == "passed" for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
