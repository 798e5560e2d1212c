"""Writes a student as a Hugging Face folder that a stranger can load.

Reads a :class:`PuzzleForCausalLM` and the teacher's tokenizer folder. Writes safetensors, ``config.json``, the
tokenizer's files, ``generation_config.json`` and the model card. A student whose layers are all alike becomes a plain
checkpoint of its family, which everything loads; any other carries the two files of modelling code, and its
``config.json`` points to them (``auto_map``), because a stock model of the family would misread it without a word.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from puzzle.checkpoint import TOKENIZER_FILES, VOCABULARY_FILES
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.modeling.configuration_puzzle import legacy_rope_fields
from puzzle.types import ConfigError

GENERATION_CONFIG = "generation_config.json"


def uniform_sizes(config: PuzzleConfig) -> tuple[int, int] | None:
    """(KV heads, FFN width) if every layer has real attention and a gated FFN of one and the same size, else None."""
    layers = range(config.num_hidden_layers)
    sizes = {(config.num_kv_heads(layer), config.ffn_width(layer)) for layer in layers}
    if len(sizes) != 1:
        return None
    num_kv_heads, ffn_width = sizes.pop()
    return None if num_kv_heads is None or ffn_width is None else (num_kv_heads, ffn_width)


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
    model.save_pretrained(out_dir)

    written = json.loads((out_dir / "config.json").read_text())
    sizes = uniform_sizes(model.config)
    if sizes is None:
        config = {**written, "auto_map": _copy_code(model, out_dir)}
    else:
        config = _family_config(model.config, written, *sizes)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, out_dir / name)
    (out_dir / "README.md").write_text(card)


def _copy_code(model: PuzzleForCausalLM, out_dir: Path) -> dict[str, str]:
    """Copies the modelling code and returns the ``auto_map`` that points to it."""
    auto_map = {}
    base_model = type(model.model)
    for auto_class, kind in (
        ("AutoConfig", type(model.config)),
        ("AutoModel", base_model),
        ("AutoModelForCausalLM", type(model)),
    ):
        source = Path(inspect.getfile(kind))
        shutil.copyfile(source, out_dir / source.name)
        auto_map[auto_class] = f"{source.stem}.{kind.__name__}"
    return auto_map


def _family_config(config: PuzzleConfig, written: dict[str, Any], num_kv_heads: int, ffn_width: int) -> dict[str, Any]:
    """The ``config.json`` of the plain family model with these sizes in every layer."""
    family_class = CONFIG_MAPPING[config.family]
    values = {name: value for name, value in written.items() if name not in ("family", "blocks", "model_type")}
    values |= {"num_key_value_heads": num_kv_heads, "intermediate_size": ffn_width}
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.family]]
    result: dict[str, Any] = family_class.from_dict(values).to_diff_dict()
    return {**result, **legacy_rope_fields(result.get("rope_parameters"))}
