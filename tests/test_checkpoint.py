"""Shapes read from ``config.json`` as it lies on the hub, and the folders that are no usable teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from puzzle.checkpoint import locate_teacher, read_shape
from puzzle.types import ConfigError, CorruptFileError, ModelShape

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


def shape_of(folder: Path, **fields: Any) -> ModelShape:
    (folder / "config.json").write_text(json.dumps({**SIZES, **fields}))
    return read_shape(folder)


def test_llama(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, model_type="llama", attention_bias=True, sliding_window=16)  # it has no windows
    assert (shape.head_dim, shape.num_kv_heads, shape.tied_embeddings, shape.windows) == (16, 2, False, ())
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias, shape.qk_norm, shape.post_norms) == (
        True,
        True,
        False,
        False,
        False,
    )
    assert shape_of(tmp_path, model_type="llama", num_key_value_heads=None, head_dim=8).num_kv_heads == 4


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 1024}, (1024,) * 8),
        ({"sliding_window": None}, ()),
        ({}, ()),  # transformers' default is 4096, as long as the longest sequence here
        ({"max_position_embeddings": 32768}, (4096,) * 8),
    ],
)
def test_mistral(fields: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    shape = shape_of(tmp_path, model_type="mistral", attention_bias=True, **fields)  # a switch that it does not have
    assert shape.windows == windows
    assert not shape.qkv_bias


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2}, ()),
        ({"sliding_window": 512, "max_window_layers": 2}, ()),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 6}, (None,) * 6 + (512,) * 2),
        ({"use_sliding_window": True, "sliding_window": 512}, ()),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, ()),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["sliding_attention", *["full_attention"] * 7],
            },
            (512,) + (None,) * 7,
        ),
    ],
)
def test_qwen(family: str, fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path) -> None:
    shape = shape_of(tmp_path, model_type=family, **fields)
    assert shape.windows == windows
    assert (shape.qkv_bias, shape.output_bias) == (family == "qwen2", False)
    assert (shape.qk_norm, shape.head_dim) == ((False, 16) if family == "qwen2" else (True, 128))


def test_gemma_3(tmp_path: Path) -> None:
    """google/gemma-3-1b-it says neither that its embeddings are tied nor, at first, which layers see everything."""
    first = shape_of(tmp_path, model_type="gemma3_text", sliding_window=512, sliding_window_pattern=3)
    assert first.windows == (512, 512, None, 512, 512, None, 512, 512)
    assert (first.tied_embeddings, first.qk_norm, first.post_norms, first.head_dim) == (True, True, True, 256)
    types = ["full_attention", *["sliding_attention"] * 7]
    later = shape_of(tmp_path, model_type="gemma3_text", sliding_window=512, layer_types=types, head_dim=32)
    assert later.windows == (None,) + (512,) * 7 and later.head_dim == 32
    assert shape_of(tmp_path, model_type="gemma3_text", sliding_window=512).windows == (512,) * 5 + (None, 512, 512)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])  # on the hub, and as transformers 5 saves it
def test_qwen_3_moe(name: str, tmp_path: Path) -> None:
    experts = {name: 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
    shape = shape_of(tmp_path, model_type="qwen3_moe", head_dim=32, **experts)
    assert (shape.num_experts, shape.num_active_experts, shape.moe_intermediate_size) == (16, 4, 24)
    assert shape.moe_layers == tuple(range(8)) and shape.windows == () and shape.head_dim == 32
    mixed = shape_of(tmp_path, model_type="qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3, 4], **experts)
    assert mixed.moe_layers == (1, 5, 7) and mixed.head_dim == 16
    with pytest.raises(CorruptFileError, match="experts: at most all active"):
        shape_of(tmp_path, model_type="qwen3_moe", **{**experts, "num_experts_per_tok": 17})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gpt2"},
            "family 'gpt2' is not supported; supported: llama, mistral, ",
        ),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3' is a multimodal model; save its language model"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            r"the weights are quantised.*model\.dequantize\(\)",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention = True is not supported",
        ),
    ],
)
def test_teachers_that_cannot_be_used(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": None},
        {"num_attention_heads": "four"},
        {"layer_types": ["sliding_attention"], "sliding_window": 8},
    ],
)
def test_malformed_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="missing or malformed field"):
        shape_of(tmp_path, model_type="gemma3_text", **{"layer_types": ["sliding_attention"], **fields})


def http_error(kind: type[Exception]) -> Exception:
    """As the hub client raises it, without asking anybody."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error")
    return error


def test_a_hub_id_may_pin_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_teacher("org/name@0a1b2c") == tmp_path
    assert locate_teacher("org/name") == tmp_path
    assert asked == [("org/name", "0a1b2c"), ("org/name", None)]


def located_offline(teacher: str, home: Path) -> str:
    """What a process of its own says, as the hub client reads its environment but once."""
    code = f"from puzzle.checkpoint import locate_teacher; print(locate_teacher({teacher!r}))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_offline_the_cache_alone_is_asked(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--name"
    for revision, commit in (("main", "0a1b2c" + 34 * "0"), ("v2", "3d4e5f" + 34 * "0")):
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
        asked = "org/name" if revision == "main" else f"org/name@{revision}"
        assert located_offline(asked, tmp_path) == str(cached / "snapshots" / commit)
    assert "org/other is not in the local cache" in located_offline("org/other", tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http_error(errors.GatedRepoError), "accept its licence on the hub and run `hf auth login`"),
        (lambda: http_error(errors.RevisionNotFoundError), "has no revision 'v9'"),
        (lambda: errors.LocalEntryNotFoundError("offline"), "not in the local cache, and the hub cannot be reached"),
        (lambda: ConnectionError("no route"), r"not to be had from the hub \(no route\)"),
    ],
)
def test_what_keeps_a_hub_teacher_away_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=message) as found:
        locate_teacher("org/name@v9")
    assert "\n" not in str(found.value)
