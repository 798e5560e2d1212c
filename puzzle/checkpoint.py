"""A Hugging Face checkpoint folder as seen without torch: where it is, its shape, its headers, its fingerprint.

Reads ``config.json`` and the headers of the safetensors files; writes nothing. Every way in which a folder can fail to
be a usable teacher is found here, before anything runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle.artifacts import file_fingerprint, fingerprint, known_fingerprint, read_json, remembered
from puzzle.export.nemotron_nas import MODEL_TYPE, llama_fields
from puzzle.types import ConfigError, CorruptFileError, ModelShape

DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher"


@dataclass(frozen=True)
class _Family:
    """What a family's ``config.json`` leaves unsaid: transformers' defaults for it, and what its layers always have."""

    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied_embeddings: bool = False
    attention_bias: bool = False  # whether there is such a switch; the same for mlp_bias
    mlp_bias: bool = False
    qkv_bias: bool = False  # always
    qk_norm: bool = False
    post_norms: bool = False
    sliding_window: int | None = None
    window_switch: bool = False  # a window only where use_sliding_window says so
    first_window_layer: int | None = None  # max_window_layers; None: there is no such field
    full_every: int | None = None  # sliding_window_pattern: every so many layers, one without a window
    num_experts: int = 0
    hidden_by_heads: bool = False  # transformers refuses a hidden size that the heads do not divide


# The torch lane's table (families_puzzle.FAMILIES) holds the same names; a test compares what either knows.
FAMILIES = {
    "llama": _Family(attention_bias=True, mlp_bias=True, hidden_by_heads=True),
    "mistral": _Family(sliding_window=4096),
    "ministral": _Family(sliding_window=4096),
    "qwen2": _Family(qkv_bias=True, sliding_window=4096, window_switch=True, first_window_layer=28),
    "qwen3": _Family(
        head_dim=128, attention_bias=True, qk_norm=True, sliding_window=4096, window_switch=True, first_window_layer=28
    ),
    "gemma3_text": _Family(
        head_dim=256,
        tied_embeddings=True,
        attention_bias=True,
        qk_norm=True,
        post_norms=True,
        sliding_window=4096,
        full_every=6,
        hidden_by_heads=True,
    ),
    "qwen3_moe": _Family(attention_bias=True, qk_norm=True, sliding_window=4096, window_switch=True, num_experts=128),
}
_UNSUPPORTED = ("use_bidirectional_attention", "final_logit_softcapping", "attn_logit_softcapping")
# What a tokenizer may consist of; at least one vocabulary must be there.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX = "model.safetensors.index.json"


def locate_teacher(teacher: str, key: str = "teacher") -> Path:
    """The folder of ``teacher``: ``demo``, a local folder, or a hub id (downloaded, or found in the local cache).

    ``org/name@revision`` pins a branch, tag or commit. With HF_HUB_OFFLINE=1 nothing but the cache is asked. ``key``:
    where the config names it, for errors.
    """
    if teacher == "demo":
        return DEMO_TEACHER
    folder = Path(teacher)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{key}: {teacher} is no model folder (it has no config.json)")
        return folder
    if folder.exists() or teacher.count("/") != 1 or teacher.startswith((".", "/", "~")):
        raise ConfigError(f"{key}: {teacher}: no such folder; give a Hugging Face folder, a hub id, or `demo`")
    return _download(teacher, key)


def _download(teacher: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    repo_id, _, revision = teacher.partition("@")
    try:
        patterns = [
            "*.json",
            "*.safetensors",
            "*.model",
            "*.jinja",
            "*.txt",
            "LICENSE*",
            "USE_POLICY*",
            "NOTICE*",
            "README.md",
        ]
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        said = f"{repo_id} is gated; accept its licence on the hub and run `hf auth login`"
    except RevisionNotFoundError:
        said = f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit"
    except LocalEntryNotFoundError:
        advice = "go online once, or give a local folder"
        said = f"{teacher} is not in the local cache, and the hub cannot be reached; {advice}"
    except Exception as error:  # the hub client raises whatever its HTTP library does; all of it means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        said = f"{repo_id}: no such local folder, and not to be had from the hub ({reason})"
    raise ConfigError(f"{key}: {said}")


def read_shape(folder: Path) -> ModelShape:
    """The sizes in ``config.json``; ConfigError for a model that is not supported, CorruptFileError for a bad field."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") == MODEL_TYPE:
        config = llama_fields(config, path)
    return shape_of(config, path)


def shape_of(config: Mapping[str, Any], path: Path) -> ModelShape:
    """:func:`read_shape` of what a ``config.json`` at ``path`` holds."""
    _check_supported(path.parent, config)
    family = FAMILIES[str(config["model_type"])]
    try:
        heads, num_layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        bias = family.attention_bias and bool(config.get("attention_bias", False))
        return ModelShape(
            family=str(config["model_type"]),
            num_layers=num_layers,
            hidden_size=int(config["hidden_size"]),
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or family.head_dim or int(config["hidden_size"]) // heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", family.tied_embeddings)),
            qkv_bias=bias or family.qkv_bias,
            output_bias=bias,
            mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            windows=_windows(config, family, num_layers),
            **_experts(config, family, num_layers),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: missing or malformed field ({error})") from None


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if isinstance(config.get("text_config"), Mapping):
        raise ConfigError(
            f"{folder}: {family!r} is a multimodal model; save its language model as a checkpoint of its own first "
            "(for Gemma 3, of family 'gemma3_text')"
        )
    if family not in FAMILIES:
        raise ConfigError(f"{folder}: family {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise ConfigError(
            f"{folder}: the weights are quantised, and blocks are trained from plain ones; take the model that they "
            "were made from, or load this one, call model.dequantize() and save it"
        )
    asked = [name for name in _UNSUPPORTED if config.get(name)]
    if asked:
        raise ConfigError(f"{folder / 'config.json'}: {asked[0]} = {config[asked[0]]!r} is not supported")


def _windows(config: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """By layer, as the family has them; () if there is none. One as long as the longest sequence is none."""
    window = config.get("sliding_window", family.sliding_window)
    if family.window_switch and not config.get("use_sliding_window", False):
        window = None
    if window is None or window >= config["max_position_embeddings"]:
        return ()
    layers = range(num_layers)
    if config.get("layer_types") is not None:
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    elif family.full_every is None and family.first_window_layer is None:
        slides = [family.sliding_window is not None for _ in layers]
    elif family.full_every is not None:
        every = config.get("sliding_window_pattern") or family.full_every
        slides = [(layer + 1) % every > 0 for layer in layers]
    else:
        first = config.get("max_window_layers", family.first_window_layer)
        slides = [layer >= first for layer in layers]
    return tuple(int(window) if slide else None for slide in slides) if any(slides) else ()


def _experts(config: Mapping[str, Any], family: _Family, num_layers: int) -> dict[str, Any]:
    """The fields of ModelShape that tell of experts; transformers saves their number under its own name."""
    count = (
        int(config.get("num_experts", config.get("num_local_experts", family.num_experts))) if family.num_experts else 0
    )
    if not count:
        return {}
    dense, every = config.get("mlp_only_layers") or [], int(config.get("decoder_sparse_step", 1))
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % every == 0)
    return {
        "moe_layers": layers,
        "num_experts": count,
        "num_active_experts": int(config["num_experts_per_tok"]),
        "moe_intermediate_size": int(config["moe_intermediate_size"]),
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint, each present and whole."""
    if (folder / _INDEX).is_file():
        files = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CorruptFileError(f"{folder / _INDEX}: has no weight_map of file names; fetch the checkpoint again")
        names = sorted(set(files.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        check_safetensors(folder / name)
    return [folder / name for name in names]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor of the checkpoint lies, by its name on disk; every file is looked into, not just the index."""
    return {name: file for file in weight_files(folder) for name in check_safetensors(file) if name != "__metadata__"}


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of the file; CorruptFileError if it is missing, no safetensors, or shorter than its header says."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if not 2 <= size <= total - 8:
                raise CorruptFileError(f"{path}: no safetensors file, or truncated; fetch or make it again")
            header: dict[str, Any] = json.loads(file.read(size))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except FileNotFoundError:
        raise CorruptFileError(f"{path}: missing; fetch the checkpoint again") from None
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"{path}: unreadable safetensors header ({error}); fetch or make it again") from None
    if total != 8 + size + end:
        raise CorruptFileError(f"{path}: {total} bytes where its header says {8 + size + end}; fetch or make it again")
    return header


def checkpoint_fingerprint(folder: Path, memory: Path) -> str:
    """By content: ``config.json`` and all weights. ``memory`` remembers hashes by size and time of change, so that
    hundreds of GB are read once; it is written only where its folder exists already."""
    with remembered(memory) as known:
        files = (folder / "config.json", *weight_files(folder))
        where = _seen_from(memory.parent.absolute(), folder.absolute())
        return fingerprint({file.name: known_fingerprint(file, f"{where}/{file.name}", known) for file in files})


def _seen_from(here: Path, folder: Path) -> str:
    """Its path from ``here``, which holds when both are moved; its own where it lies on another drive."""
    try:
        return os.path.relpath(folder, here)
    except ValueError:
        return str(folder)


def tokenizer_fingerprint(folder: Path) -> str:
    """By content of whatever tokenizer files there are; ConfigError if there is no vocabulary."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(f"{folder}: no tokenizer here; looked for {', '.join(VOCABULARY_FILES)}")
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return fingerprint({file.name: file_fingerprint(file) for file in files})


def check_same_tokens(own: Path, other: Path, key: str) -> None:
    """ConfigError where the tokenizer in ``other``, which the config names at ``key``, numbers tokens otherwise."""
    if tokenizer_fingerprint(own) == tokenizer_fingerprint(other):
        return
    left, right = _numbered(own), _numbered(other)
    if differing := sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token)):
        raise ConfigError(
            f"{key}: {other} has other tokens than {own} ({len(differing):,} differ, such as {differing[0]!r}); "
            "predictions are compared token by token, so take a model with the same tokenizer"
        )


def _numbered(folder: Path) -> dict[str, Any]:
    """Numbers by token; where there is no tokenizer.json, fingerprints by file of what stands in its place."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        files = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
        return {file.name: file_fingerprint(file) for file in files}
    data = read_json(path)
    try:
        found = data["model"]["vocab"]
        numbers = found if isinstance(found, dict) else {token: number for number, (token, _) in enumerate(found)}
        return {**numbers, **{added["content"]: added["id"] for added in data.get("added_tokens") or []}}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: missing or malformed field ({error}); fetch the tokenizer again") from None
