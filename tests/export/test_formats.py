"""A student with every kind of variant, first and last layer included, in every format, as each one's reader has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from puzzle.checkpoint import read_shape, weight_files
from puzzle.export import gguf, lowering, verify_torch
from puzzle.export.decilm import export_mlx, export_nemotron_nas
from puzzle.export.hf import export_hf
from puzzle.export.lowering import for_llama_cpp
from puzzle.export.shards import write_sharded
from puzzle.export.source import Source, pieces
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.teacher import Teacher, load_config
from puzzle.types import ConfigError, CorruptFileError
from puzzle.variants import variant_name
from tests.exporting import saved

KEEP, SKIP, LINEAR = {"kind": "keep"}, {"kind": "skip"}, {"kind": "linear"}
GQA, NARROW = {"kind": "gqa", "num_kv_heads": 2}, {"kind": "narrow", "intermediate_size": 40}
BLOCKS = [
    (SKIP, KEEP),
    (GQA, NARROW),
    (LINEAR, LINEAR),
    (KEEP, SKIP),
    (SKIP, LINEAR),
    (SKIP, SKIP),
    (LINEAR, KEEP),
    (SKIP, SKIP),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0))


def make_student(blocks: list[Any], **fields: Any) -> PuzzleForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=len(blocks),
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters=LLAMA3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )
    entries = [{"attention": attention, "ffn": ffn} for attention, ffn in blocks]
    model = PuzzleForCausalLM(PuzzleConfig.from_family(config, entries)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["own_head", "tied"])
def student(request: pytest.FixtureRequest) -> PuzzleForCausalLM:
    return make_student(BLOCKS, tie_word_embeddings=request.param)


@pytest.fixture
def source(student: PuzzleForCausalLM, tmp_path: Path) -> Source:
    return Source.open(saved(student, tmp_path / "student"))


@torch.no_grad()
def close(found: Tensor, student: PuzzleForCausalLM, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, student(TOKENS).logits, rtol=0, atol=tolerance)


def test_a_source_is_what_the_student_is(source: Source) -> None:
    assert [(variant_name(attention), variant_name(ffn)) for attention, ffn in source.layers][:4] == [
        ("skip", "keep"),
        ("gqa-2", "narrow-40"),
        ("linear", "linear"),
        ("keep", "skip"),
    ]
    assert source.dtype == "float32"


@torch.no_grad()
def test_nemotron_nas_by_its_readers_rules(
    student: PuzzleForCausalLM, source: Source, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    export_nemotron_nas(source, tiny_tokenizer_dir, tmp_path / "out")
    close(verify_torch.logits(verify_torch.read_folder(tmp_path / "out"), TOKENS), student)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"model.layers.2.self_attn.linear_attn.weight", "model.layers.2.mlp.linear_mlp.weight"} < names
    assert ("lm_head.weight" in names) != student.config.tie_word_embeddings
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@torch.no_grad()
def test_mlx_has_its_own_names_for_linear_blocks(
    student: PuzzleForCausalLM, source: Source, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    export_mlx(source, tiny_tokenizer_dir, tmp_path / "out")
    close(verify_torch.logits(verify_torch.read_folder(tmp_path / "out"), TOKENS), student)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"model.layers.2.self_attn.linear.weight", "model.layers.2.mlp.linear.weight"} < names


@torch.no_grad()
def test_nemotron_nas_read_back_is_the_same_model(
    student: PuzzleForCausalLM, source: Source, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    export_nemotron_nas(source, tiny_tokenizer_dir, tmp_path / "nas")
    back = Source.open(tmp_path / "nas")
    kinds = [(attention.kind, ffn.kind) for attention, ffn in back.layers]
    padded = {"narrow": "keep"}  # 96 and 40 channels are both stored as 256, which is the most there is
    expected = [(attention["kind"], ffn["kind"]) for attention, ffn in BLOCKS]
    assert [ffn for _, ffn in kinds] == [padded.get(ffn, ffn) for _, ffn in expected]
    assert [attention for attention, _ in kinds] == [attention for attention, _ in expected]
    export_hf(back, tmp_path / "nas", tmp_path / "again")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(TOKENS).logits, student)
    with pytest.raises(ConfigError, match=r"its layers differ \(layer 0: attention .*skip.*must be alike"):
        read_shape(tmp_path / "nas")


@torch.no_grad()
def test_a_uniform_nemotron_nas_checkpoint_is_a_teacher(
    tiny_tokenizer_dir: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    model = make_student([(GQA, {"kind": "narrow", "intermediate_size": 96})] * 2)
    export_nemotron_nas(Source.open(saved(model, tmp_path / "s")), tiny_tokenizer_dir, tmp_path / "nas")
    shape = read_shape(tmp_path / "nas")
    assert (shape.family, shape.num_kv_heads, shape.intermediate_size) == ("llama", 2, 256)
    teacher = Teacher(tmp_path / "nas", torch.device("cpu"), torch.float32)
    assert teacher.layer(1).self_attn.k_proj.weight.shape == (32, 64)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window_length": 128}, ConfigError, "block_configs: attention: window_length = 128 is not supported"),
        ({"n_heads_in_group": None}, CorruptFileError, "config.json: missing or malformed field"),
    ],
)
def test_what_cannot_be_read_back_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = make_student([(KEEP, KEEP)])
    export_nemotron_nas(Source.open(saved(model, tmp_path / "s")), tiny_tokenizer_dir, tmp_path / "nas")
    path = tmp_path / "nas" / "config.json"
    config = json.loads(path.read_text())
    config["block_configs"][0]["attention"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load_config(tmp_path / "nas")


def test_nvidias_own_config_is_understood() -> None:
    """Fields as those of Llama-3.1-Nemotron-51B's config.json, a few of its layers."""
    from puzzle.export.nemotron_nas import puzzle_fields

    no = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    attention = {"n_heads_in_group": 8, "num_sink_tokens": None, "window_length": None, "unshifted_sink": False, **no}
    config = {
        "model_type": "nemotron-nas",
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "num_hidden_layers": 3,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "block_configs": [
            {"attention": attention, "ffn": {"ffn_mult": 5.25, **no}},
            {"attention": {**attention, "no_op": True, "n_heads_in_group": None}, "ffn": {"ffn_mult": 1.3125, **no}},
            {"attention": {**attention, "replace_with_linear": True}, "ffn": {**no, "no_op": True, "ffn_mult": None}},
        ],
    }
    fields = puzzle_fields(config, "config.json")
    assert (fields["num_key_value_heads"], fields["intermediate_size"], fields["head_dim"]) == (8, 28672, 128)
    assert fields["blocks"] == [
        {"attention": KEEP, "ffn": KEEP},
        {"attention": SKIP, "ffn": {"kind": "narrow", "intermediate_size": 7168}},
        {"attention": LINEAR, "ffn": SKIP},
    ]
    assert PuzzleConfig(**fields).rope_parameters["rope_theta"] == 500000.0


# ---------------------------------------------------------------------------------------------------------------- GGUF


@torch.no_grad()
@pytest.mark.parametrize(("stored_as", "tolerance"), [(None, 1e-4), ("BF16", 1.0), ("F16", 0.05), ("Q8_0", 1.0)])
def test_gguf_by_llama_cpps_rules(
    stored_as: Any,
    tolerance: float,
    student: PuzzleForCausalLM,
    source: Source,
    tiny_tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("gguf")
    gguf.export_gguf(source, tiny_tokenizer_dir, tmp_path / "out", stored_as)
    close(verify_torch.logits(verify_torch.read_gguf(tmp_path / "out" / gguf.FILE), TOKENS), student, tolerance)
    assert gguf.is_exact(source, stored_as) == (stored_as is None)


@torch.no_grad()
def test_without_lowering_llama_cpp_would_compute_something_else(
    student: PuzzleForCausalLM,
    source: Source,
    tiny_tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")
    nothing = lowering._zero_ffn(64, torch.float32)
    monkeypatch.setattr(lowering, "_zero_ffn", lambda *_: lowering.Piece(nothing.spec.__class__("skip"), dict))
    monkeypatch.setattr(gguf, "_width", lambda ffn, _: 0 if ffn.spec.kind == "skip" else 96)
    kept = make_student([(KEEP, SKIP), (KEEP, KEEP)])
    gguf.export_gguf(Source.open(saved(kept, tmp_path / "s")), tiny_tokenizer_dir, tmp_path / "out")
    found = verify_torch.logits(verify_torch.read_gguf(tmp_path / "out" / gguf.FILE), TOKENS)
    assert float((found - kept(TOKENS).logits).abs().max()) > 0.1


def test_layers_for_llama_cpp(source: Source) -> None:
    written = for_llama_cpp(pieces(source), 64, torch.float32)
    names = [(variant_name(attention.spec), variant_name(ffn.spec)) for attention, ffn in written]
    assert names == [
        ("linear", "keep"),  # of zeros
        ("gqa-2", "narrow-40"),
        ("linear", "narrow-32"),
        ("linear", "narrow-32"),  # the linear FFN of the same layer
        ("keep", "narrow-32"),
        ("linear", "narrow-32"),
        ("linear", "keep"),
    ]
    assert not written[0][0].tensors()["self_attn.linear_attn.weight"].any()
    nothing = make_student([(SKIP, SKIP)])
    assert nothing.config.kv_heads(0) is None


def test_the_tokenizer_lies_in_the_gguf_file(source: Source, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    gguf.export_gguf(source, tiny_tokenizer_dir, tmp_path / "out")
    fields = package.GGUFReader(tmp_path / "out" / gguf.FILE)
    tokens = fields.get_field("tokenizer.ggml.tokens").contents()
    vocabulary = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == 128 and all(tokens[index] == token for token, index in vocabulary.items())
    assert fields.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert fields.get_field("tokenizer.ggml.token_type").contents()[:4] == [3, 3, 3, 1]
    assert fields.get_field("tokenizer.ggml.eos_token_id").contents() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Metaspace"}}, "only byte-level BPE"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\d"}},
                        {"type": "ByteLevel", "use_regex": False},
                    ],
                }
            },
            "would split text otherwise",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    change: dict[str, Any], message: str, source: Source, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    data = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ConfigError, match=message):
        gguf.export_gguf(source, tmp_path, tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- shards


@torch.no_grad()
def test_shards_are_what_transformers_reads(
    student: PuzzleForCausalLM, source: Source, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    export_hf(source, tiny_tokenizer_dir, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    write_sharded(state.items(), tmp_path / "out", shard_bytes=60_000)
    files = weight_files(tmp_path / "out")
    assert len(files) > 2 and all(file.stat().st_size < 70_000 for file in files)
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, student, 1e-5)
    files[1].write_bytes(files[1].read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match=f"{files[1].name}: .* bytes where its header says"):
        Source.open(tmp_path / "out")


@torch.no_grad()
def test_windows_of_one_size_are_written_for_vllm_alone(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    window = {"kind": "window", "window_tokens": 5}
    model = make_student([(KEEP, KEEP), (window, KEEP), (SKIP, KEEP), (window, SKIP)])
    source = Source.open(saved(model, tmp_path / "s"))
    export_nemotron_nas(source, tiny_tokenizer_dir, tmp_path / "out")
    close(verify_torch.logits(verify_torch.read_folder(tmp_path / "out"), TOKENS), model)
    assert [variant_name(attention) for attention, _ in Source.open(tmp_path / "out").layers] == [
        *("keep", "window-5", "skip", "window-5")
    ]
    with pytest.raises(ConfigError, match=r"mlx-lm refuses attention window-5 at layers 1, 3: .*serve_on: \[mlx-lm\]"):
        export_mlx(source, tiny_tokenizer_dir, tmp_path / "mlx")
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match=r"llama.cpp refuses attention window-5 at layers 1, 3: .*llama.cpp\]"):
        gguf.export_gguf(source, tiny_tokenizer_dir, tmp_path / "gguf")


def test_what_a_format_cannot_say_is_refused_before_anything_is_written(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    windows = [({"kind": "window", "window_tokens": size}, KEEP) for size in (5, 6)]
    source = Source.open(saved(make_student(windows), tmp_path / "s"))
    with pytest.raises(ConfigError, match="layer 1: a window of 6 tokens .* beside one of 5 at layer 0"):
        export_nemotron_nas(source, tiny_tokenizer_dir, tmp_path / "out")
    sinks = make_student([({"kind": "window", "window_tokens": 5, "sink_tokens": 1}, KEEP)])
    with pytest.raises(ConfigError, match="layer 0: attention window-5-sinks-1 cannot be written as nemotron-nas"):
        export_nemotron_nas(Source.open(saved(sinks, tmp_path / "k")), tiny_tokenizer_dir, tmp_path / "out")
    biased = Source.open(saved(make_student([(KEEP, KEEP)], attention_bias=True), tmp_path / "b"))
    with pytest.raises(ConfigError, match="biases"):
        export_nemotron_nas(biased, tiny_tokenizer_dir, tmp_path / "out")
    own_heads = Source.open(saved(make_student([(KEEP, KEEP)], head_dim=8), tmp_path / "h"))
    with pytest.raises(ConfigError, match="the teacher's have 8 channels"):
        export_mlx(own_heads, tiny_tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
