"""Exports as a stranger finds them: what lies in the folder, and what a process without puzzle makes of it."""

from __future__ import annotations

import ast
import copy
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import puzzle.modeling
from puzzle.export.verify import Verdict, verify, write_reference
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import Compute, load_model
from puzzle.types import ConfigError, CorruptFileError
from tests.exporting import export_hf, saved
from tests.tiny_families import make_stock
from tests.tiny_families import make_student as make_family_student

KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, NARROW = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "narrow", "intermediate_size": 40}
MIXED = [
    {"attention": SKIP, "ffn": KEEP},
    {"attention": GQA, "ffn": NARROW},
    {"attention": LINEAR, "ffn": LINEAR},
    {"attention": KEEP, "ffn": SKIP},
]


def make_student(teacher: LlamaForCausalLM, blocks: list[dict[str, Any]]) -> PuzzleForCausalLM:
    torch.manual_seed(11)
    return PuzzleForCausalLM(PuzzleConfig.from_family(teacher.config, blocks)).eval()


def verified(export: Path, reference: Path) -> Verdict:
    return verify(export, "transformers", reference=reference)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def student(tiny_llama: LlamaForCausalLM) -> PuzzleForCausalLM:
    return make_student(tiny_llama, MIXED)


@pytest.fixture(scope="module")
def teacher_dir(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tokenizer's files and a generation config that would sample."""
    folder = tmp_path_factory.mktemp("teacher")
    for file in tiny_tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 3], "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(b"the teacher's weights, not to be copied")
    return folder


@pytest.fixture(scope="module")
def mixed_export(student: PuzzleForCausalLM, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("exports") / "mixed"
    out_dir.mkdir()
    export_hf(student, teacher_dir, out_dir)
    return out_dir


def test_mixed_export_is_complete(mixed_export: Path, teacher_dir: Path) -> None:
    code = {f"{name}_puzzle.py" for name in ("configuration", "families", "spans", "layers", "modeling")}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert files(mixed_export) == {"config.json", "model.safetensors", *copied, *code}
    for name in copied:
        assert (mixed_export / name).read_bytes() == (teacher_dir / name).read_bytes()
    config = json.loads((mixed_export / "config.json").read_text())
    assert config["model_type"] == "puzzle"
    assert config["blocks"] == MIXED
    assert config["auto_map"] == {
        "AutoConfig": "configuration_puzzle.PuzzleConfig",
        "AutoModel": "modeling_puzzle.PuzzleModel",
        "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
    }
    exported, original = (
        AutoTokenizer.from_pretrained(folder)("ab").input_ids for folder in (mixed_export, teacher_dir)
    )
    assert exported == original
    assert len(original) == 2


def test_code_files_import_torch_and_transformers_only() -> None:
    folder = Path(puzzle.modeling.__file__).parent
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    neighbours = tuple(f"{name}_puzzle" for name in ("configuration", "families", "spans", "layers", "modeling"))
    for name in neighbours:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                relative = node.level == 1 and node.module in neighbours
                assert relative or (node.module or "").split(".")[0] in allowed


def test_mixed_export_passes_in_a_clean_process(student: PuzzleForCausalLM, mixed_export: Path, tmp_path: Path) -> None:
    write_reference(saved(student, mixed_export), tmp_path / "reference.safetensors")
    python = Path(os.path.relpath(sys.executable))
    verdict = verify(mixed_export, "transformers", python, tmp_path / "reference.safetensors")
    assert verdict.line().startswith(f"transformers {transformers.__version__}: passed, logits within")


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_mixed_exports_of_other_families_pass_in_a_clean_process(
    family: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Windows narrower than the reference's tokens, sinks, an attention-free first layer, fewer experts."""
    window = {"kind": "window", "window_tokens": 3}
    blocks = [
        {"attention": SKIP, "ffn": KEEP},
        {"attention": {**window, "sink_tokens": 2}, "ffn": {"kind": "narrow", "intermediate_size": 24}},
        {"attention": window, "ffn": {"kind": "experts", "num_experts": 3} if family == "qwen3_moe" else LINEAR},
        {"attention": KEEP, "ffn": KEEP},
    ]
    model = make_family_student(make_stock(family), blocks)
    export_hf(model, tiny_tokenizer_dir, tmp_path / "out")
    write_reference(saved(model, tmp_path / "out"), tmp_path / "reference.safetensors")
    verdict = verified(tmp_path / "out", tmp_path / "reference.safetensors")
    assert verdict.status == "passed", verdict.failures


def test_a_plain_export_names_its_experts_as_all_readers_do(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    fewer = {"attention": KEEP, "ffn": {"kind": "experts", "num_experts": 4}}
    model = make_family_student(make_stock("qwen3_moe", mlp_only_layers=[]), [fewer] * 4)
    export_hf(model, tiny_tokenizer_dir, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_experts"], config["num_local_experts"]) == ("qwen3_moe", 4, 4)
    names = {f"model.layers.0.mlp.experts.3.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
    assert names < set(load_file(tmp_path / "out" / "model.safetensors"))


@torch.no_grad()
def test_uniform_export_is_a_plain_llama(tiny_llama_tied: LlamaForCausalLM, teacher_dir: Path, tmp_path: Path) -> None:
    model = make_student(tiny_llama_tied, [{"attention": GQA, "ffn": NARROW}] * 4)
    export_hf(model, teacher_dir, tmp_path / "uniform")
    assert not any(name.endswith(".py") for name in files(tmp_path / "uniform"))
    config = json.loads((tmp_path / "uniform" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {"blocks", "family", "auto_map"}.isdisjoint(config)
    assert (config["model_type"], config["num_key_value_heads"], config["intermediate_size"]) == ("llama", 2, 40)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform", output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert not any(info.values())
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "last",
    [{"attention": KEEP, "ffn": {"kind": "narrow", "intermediate_size": 96}}, {"attention": KEEP, "ffn": SKIP}],
    ids=["same_size_under_another_name", "skipped"],
)
def test_uniform_means_the_same_sizes(
    last: dict[str, Any], tiny_llama: LlamaForCausalLM, teacher_dir: Path, tmp_path: Path
) -> None:
    blocks = [{"attention": {"kind": "gqa", "num_kv_heads": 4}, "ffn": KEEP}] * 3 + [last]
    export_hf(make_student(tiny_llama, blocks), teacher_dir, tmp_path / "out")
    model_type = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert model_type == ("puzzle" if last["ffn"] == SKIP else "llama")


@pytest.mark.parametrize(("family", "expected"), [("ministral", "ministral"), ("qwen3", "puzzle")])
def test_windows_in_some_layers_are_plain_where_readers_know_of_them(
    family: str, expected: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    window = {"attention": {"kind": "window", "window_tokens": 5}, "ffn": KEEP}
    stock = make_stock(family, layer_types=["full_attention"] * 4, sliding_window=None)
    model = make_family_student(stock, [{"attention": KEEP, "ffn": KEEP}, window] * 2)
    export_hf(model, tiny_tokenizer_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == expected


def test_all_linear_is_not_uniform(tiny_llama: LlamaForCausalLM, teacher_dir: Path, tmp_path: Path) -> None:
    export_hf(make_student(tiny_llama, [{"attention": LINEAR, "ffn": LINEAR}] * 4), teacher_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "puzzle"


def test_what_is_wrong_is_reported_in_words(student: PuzzleForCausalLM, mixed_export: Path, tmp_path: Path) -> None:
    """A wrong weight or logit, and the classic mistake: cache slots numbered over all layers, attention or not."""
    export, reference = tmp_path / "export", tmp_path / "reference.safetensors"
    shutil.copytree(mixed_export, export)
    code = (export / "layers_puzzle.py").read_text()
    assert "layer_idx = cache_idx" in code
    (export / "layers_puzzle.py").write_text(code.replace("layer_idx = cache_idx", "layer_idx = layer_idx"))
    write_reference(saved(student, mixed_export), reference)
    tensors = load_file(reference)
    tensors["logits"][1, 5, 7] += 0.01
    save_file(tensors, reference)

    verdict = verified(export, reference)
    assert verdict.status == "failed" and verdict.line().startswith("transformers")
    assert verdict.differences["max_logit_difference"] == pytest.approx(0.01, rel=0.01)
    assert [failure.split(":")[0] for failure in verdict.failures] == [
        "its logits differ from those of the model it was made from",
        "continuing a cache in chunks differs from one shot",
    ]


def test_export_that_needs_puzzle_is_refused(student: PuzzleForCausalLM, mixed_export: Path, tmp_path: Path) -> None:
    export, reference = tmp_path / "export", tmp_path / "reference.safetensors"
    shutil.copytree(mixed_export, export)
    with (export / "modeling_puzzle.py").open("a") as file:
        file.write("\nimport puzzle.types\n")
    write_reference(saved(student, mixed_export), reference)
    with pytest.raises(CorruptFileError, match=r"could not be checked in transformers, in a clean process: .*puzzle"):
        verified(export, reference)


def test_every_field_can_fail() -> None:
    good = {
        "max_logit_difference": 0.0,
        "tokens_unlike_without_cache": 0.0,
        "chunked_difference": 0.0,
        "left_padding_difference": 0.0,
    }
    assert Verdict("transformers", differences=good).status == "passed"
    for name in good:
        for bad in (2e-4, float("nan"), float("inf")):
            verdict = Verdict("transformers", differences={**good, name: bad})
            assert verdict.status == "failed"
            assert len(verdict.failures) == 1
    rounded = Verdict("transformers", differences={**good, "max_logit_difference": 0.1}, rounded_allowed=0.2)
    assert rounded.status == "passed" and rounded.line().endswith("(its numbers are rounded)")
    other = Verdict("transformers", differences={**good, "greedy_tokens_unlike": 1.0})
    assert other.status == "failed" and "other tokens" in other.failures[0]
    assert replace(other, rounded_allowed=0.2).status == "passed"  # rounding may choose another
    assert Verdict("transformers", reason="not installed").status == "unverified"


def test_reference_of_a_bf16_model_is_in_fp32(student: PuzzleForCausalLM, tmp_path: Path) -> None:
    model = copy.deepcopy(student).to(torch.bfloat16)
    folder = saved(model, tmp_path / "bf16")
    tokens = torch.randint(0, 128, (3, 5), generator=torch.Generator().manual_seed(0))
    write_reference(folder, tmp_path / "reference.safetensors", tokens=tokens, num_greedy=4)
    tensors = load_file(tmp_path / "reference.safetensors")
    assert tensors["logits"].dtype == torch.float32
    assert tensors["logits"].shape == (3, 5, 128)
    whole = load_model(folder, Compute(torch.device("cpu"), bf16=False))
    with torch.no_grad():  # one layer at a time, or all of it
        assert torch.equal(whole(tensors["input_ids"]).logits, tensors["logits"])
        grown = whole.generate(tokens[:1], max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(grown[0], tensors["greedy_ids"]) and int(tensors["num_greedy"]) == 4


def test_refusals_say_what_to_do(student: PuzzleForCausalLM, teacher_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer here; looked for tokenizer\.json"):
        export_hf(student, tmp_path, tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        export_hf(student, teacher_dir, tmp_path / "used")
    with pytest.raises(ConfigError, match="no such file"):
        verify(tmp_path / "nowhere", "transformers")
