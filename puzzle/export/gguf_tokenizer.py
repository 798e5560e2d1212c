"""A Hugging Face tokenizer as llama.cpp reads it out of a GGUF file.

Reads ``tokenizer.json`` and ``tokenizer_config.json``; adds metadata to a writer. Byte-level BPE only, and only where
llama.cpp knows how the text is split before: an unknown one would be encoded otherwise without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle.artifacts import read_json
from puzzle.types import ConfigError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a split, and whether a word that is a token is one before any merge
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: ("llama-bpe", True), _WORDS + r"\p{N}" + _REST: ("qwen2", False)}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def package() -> Any:
    """The package ``gguf``; ConfigError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF files are written through the package gguf: pip install 'puzzle-nas[gguf]'") from None
    return gguf


def check_tokenizer(folder: Path) -> None:
    """Raises ConfigError where a GGUF file with the tokenizer in ``folder`` cannot be written here."""
    package()
    _pre(_read(folder), folder / "tokenizer.json")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no tokenizer.json, which GGUF is written from; load the tokenizer and save it again"
        )
    return read_json(path)


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Adds vocabulary, merges, special tokens and chat template. ConfigError for a tokenizer that is not supported."""
    path, data = folder / "tokenizer.json", _read(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(data, path))
    tokens, types = _vocabulary(data, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    package().SpecialVocab(folder, load_merges=bool(data["model"].get("merges")), n_vocab=vocab_size).add_to_gguf(
        writer, quiet=True
    )


def _vocabulary(data: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """By id; those that the embedding has beyond the tokenizer's are named and marked unused."""
    tokens, types = [f"[UNUSED{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    vocabulary, more = data["model"]["vocab"], data.get("added_tokens") or []
    largest = max([*vocabulary.values(), *(added["id"] for added in more)])
    if largest >= vocab_size:
        raise ConfigError(f"the tokenizer has a token {largest}, and the model {vocab_size} only; give the model's own")
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for added in more:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _pre(data: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name of how text is split into words."""
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    model = data["model"]
    if model.get("type") != "BPE" or not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise ConfigError(f"{path}: only byte-level BPE can be written as GGUF; export the model as hf")
    name, ignore_merges = None, False
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name, ignore_merges = SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""), (None, False))
    if name is None or bool(model.get("ignore_merges")) != ignore_merges:
        raise ConfigError(f"{path}: llama.cpp would split text otherwise than this tokenizer; export the model as hf")
    return name
