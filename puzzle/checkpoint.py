"""A Hugging Face checkpoint folder as seen without torch: where it is, its shape, its headers, its fingerprint.

Reads ``config.json`` and the headers of the safetensors files; writes nothing. Every way in which a folder can fail to
be a usable teacher is found here, before anything runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzle.artifacts import file_fingerprint, fingerprint, read_json
from puzzle.types import ConfigError, CorruptFileError, ModelShape

DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher"
FAMILIES = ("llama",)  # the torch lane's table (modeling_puzzle.FAMILIES) holds the same names; a test compares them
_INDEX = "model.safetensors.index.json"


def locate_teacher(teacher: str) -> Path:
    """The folder of ``teacher``: ``demo``, a local folder, or a hub id (downloaded, or found in the local cache)."""
    if teacher == "demo":
        return DEMO_TEACHER
    folder = Path(teacher)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"teacher: {teacher} is no model folder (it has no config.json)")
        return folder
    if folder.exists() or teacher.count("/") != 1 or teacher.startswith((".", "/", "~")):
        raise ConfigError(f"teacher: {teacher}: no such folder; give a Hugging Face folder, a hub id, or `demo`")
    return _download(teacher)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "LICENSE*", "README.md"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ConfigError(
            f"teacher: {repo_id} is gated; accept its licence on the hub and run `hf auth login`"
        ) from None
    except Exception as error:  # the hub client raises whatever its HTTP library does; all of it means the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"teacher: {repo_id}: no such local folder, and not to be had from the hub ({reason})"
        ) from None


def read_shape(folder: Path) -> ModelShape:
    """The sizes in ``config.json``; ConfigError for a family that is not supported or a field that is missing."""
    config = read_json(folder / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{folder}: family {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        heads = int(config["num_attention_heads"])
        return ModelShape(
            family=str(family),
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder / 'config.json'}: missing or malformed field ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint, each present and whole."""
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        check_safetensors(folder / name)
    return [folder / name for name in names]


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


def checkpoint_fingerprint(folder: Path) -> str:
    """By content: ``config.json`` and all weights."""
    files = [folder / "config.json", *weight_files(folder)]
    return fingerprint({file.name: file_fingerprint(file) for file in files})


def tokenizer_fingerprint(folder: Path) -> str:
    """By content of whatever tokenizer files there are."""
    files = sorted(path for path in folder.glob("*token*") if path.suffix in (".json", ".model"))
    if not files:
        raise ConfigError(f"{folder}: no tokenizer files; save the model's tokenizer into its folder")
    return fingerprint({file.name: file_fingerprint(file) for file in files})
