"""Writes a student as a Hugging Face folder that a stranger can load.

Reads a :class:`PuzzleForCausalLM` and the teacher's tokenizer folder. Writes safetensors, ``config.json``, the
tokenizer's files, ``generation_config.json`` and the model card. A student that its family's own config can describe
becomes a plain checkpoint of the family, with the family's names on disk, which everything loads; any other carries
the files of modelling code, and its ``config.json`` points to them (``auto_map``), because a stock model of the family
would misread it without a word.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from puzzle.checkpoint import TOKENIZER_FILES, VOCABULARY_FILES
from puzzle.modeling import (
    PuzzleConfig,
    PuzzleForCausalLM,
    PuzzleModel,
    configuration_puzzle,
    families_puzzle,
    family_of,
    layers_puzzle,
    modeling_puzzle,
    spans_puzzle,
)
from puzzle.modeling.configuration_puzzle import FULL, SLIDING, legacy_rope_fields
from puzzle.types import ConfigError

GENERATION_CONFIG = "generation_config.json"


def plain_config(config: PuzzleConfig) -> PreTrainedConfig | None:
    """The config of the family's plain model that is the same as ``config``'s; None where there is no such model."""
    layers = range(config.num_hidden_layers)
    windows = [config.span(layer)[0] for layer in layers]
    if 1 in windows:  # transformers' own models fail with a cache then
        return None
    values: dict[str, Any] = {
        "num_key_value_heads": next(filter(None, map(config.num_kv_heads, layers)), None),
        "intermediate_size": next(filter(None, map(config.ffn_width, layers)), None),
    }
    experts = next(filter(None, map(config.experts, layers)), None)
    if experts is not None:
        values |= {"num_experts": experts[0], "num_experts_per_tok": experts[1]}
    if windows != [config.own_window(layer) for layer in layers]:
        window = next(filter(None, windows), None)
        types = [FULL if window is None else SLIDING for window in windows]
        values |= {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": types}
    plain = config.family_config()
    for name, value in values.items():
        if value is not None and hasattr(plain, name):
            setattr(plain, name, value)
    described = PuzzleConfig.from_family(plain)  # what that family makes of it
    same = all(_layer(described, layer) == _layer(config, layer) for layer in layers)
    return plain if same else None


def _layer(config: PuzzleConfig, layer: int) -> tuple[Any, ...]:
    """All there is to know about a layer but its weights; a FFN without channels or experts is like no other."""
    sizes = (config.num_kv_heads(layer), config.ffn_width(layer), config.experts(layer))
    rope = config.layer_type(layer) if family_of(config).rope_by_layer_type else None
    return (*sizes, config.span(layer), rope)


def export_hf(model: PuzzleForCausalLM, tokenizer_dir: Path, out_dir: Path, card: str) -> None:
    """Writes ``model`` into ``out_dir``, new or empty; ``card`` is the text of the model card (README.md).

    Weights keep the dtype they have. Publishing the folder as a whole is the caller's part (``puzzle.artifacts``).
    Raises ConfigError where ``out_dir`` is in use or ``tokenizer_dir`` holds no tokenizer.
    """
    if not any((tokenizer_dir / name).is_file() for name in VOCABULARY_FILES):
        raise ConfigError(f"{tokenizer_dir}: no tokenizer here; looked for {', '.join(VOCABULARY_FILES)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty; give a new folder")
    plain = plain_config(model.config)
    if plain is None:
        model.save_pretrained(out_dir)
        config = {**json.loads((out_dir / "config.json").read_text()), "auto_map": _copy_code(out_dir)}
    else:
        _stock_model(model, plain).save_pretrained(out_dir)
        config = _family_fields(json.loads((out_dir / "config.json").read_text()))
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, out_dir / name)
    (out_dir / "README.md").write_text(card)


def _copy_code(out_dir: Path) -> dict[str, str]:
    """Copies the modelling code and returns the ``auto_map`` that points to it."""
    for module in (configuration_puzzle, families_puzzle, spans_puzzle, layers_puzzle, modeling_puzzle):
        source = Path(inspect.getfile(module))
        shutil.copyfile(source, out_dir / source.name)
    classes = {"AutoConfig": PuzzleConfig, "AutoModel": PuzzleModel, "AutoModelForCausalLM": PuzzleForCausalLM}
    return {auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in classes.items()}


def _stock_model(model: PuzzleForCausalLM, plain: PreTrainedConfig) -> PreTrainedModel:
    """Transformers' own model with the weights of ``model``, which are not copied."""
    plain.dtype = model.dtype
    with torch.device("meta"):
        stock: Any = AutoModelForCausalLM.from_config(plain, dtype=model.dtype)
    stock.load_state_dict(model.state_dict(), strict=True, assign=True)
    stock.tie_weights()
    found: PreTrainedModel = stock
    return found


def _family_fields(written: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` as transformers wrote it, with the names that other readers know next to its own."""
    others = legacy_rope_fields(written.get("rope_parameters"))
    if "num_local_experts" in written:
        others["num_experts"] = written["num_local_experts"]
    return {**written, **others}
