"""A Hugging Face checkpoint folder as seen without torch: where it is, its shape, its headers, its fingerprint.

Reads ``config.json`` and the headers of the safetensors files; writes nothing. Every way in which a folder can fail to
be a usable teacher is found here, before anything runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puzzle.artifacts import file_fingerprint, fingerprint, read_json, write_text
from puzzle.types import ConfigError, CorruptFileError, ModelShape

DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher"
FAMILIES = ("llama",)  # the torch lane's table (modeling_puzzle.FAMILIES) holds the same names; a test compares them
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
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]
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


def checkpoint_fingerprint(folder: Path, memory: Path) -> str:
    """By content: ``config.json`` and all weights. ``memory`` remembers hashes by size and time of change, so that
    hundreds of GB are read once; it is written only where its folder exists already."""
    known = read_json(memory) if memory.exists() else {}
    found: dict[str, Any] = {}
    for file in (folder / "config.json", *weight_files(folder)):
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(file.name)
        content = entry[1] if entry and entry[0] == stamp else file_fingerprint(file)
        found[file.name] = [stamp, content]
    if found != known and memory.parent.is_dir():
        write_text(memory, json.dumps(found, indent=1) + "\n")
    return fingerprint({name: content for name, (_, content) in found.items()})


def tokenizer_fingerprint(folder: Path) -> str:
    """By content of whatever tokenizer files there are; ConfigError if there is no vocabulary."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(f"{folder}: no tokenizer here; looked for {', '.join(VOCABULARY_FILES)}")
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return fingerprint({file.name: file_fingerprint(file) for file in files})
