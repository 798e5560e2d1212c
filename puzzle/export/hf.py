"""Writes a student as a Hugging Face folder that a stranger can load.

Reads a :class:`~puzzle.export.source.Source` and the teacher's tokenizer folder. Writes safetensors, ``config.json``,
the tokenizer's files and ``generation_config.json``. A student that its family's own config can describe becomes a
plain checkpoint of the family, with the family's names on disk, which everything loads; any other carries the files of
modelling code, and its ``config.json`` points to them (``auto_map``), because a stock model of the family would misread
it without a word.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from puzzle.export.folder import begin, copy_tokenizer
from puzzle.export.shards import write_sharded
from puzzle.export.source import Source, pieces
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

# Families whose classes in vLLM have one window for all layers: mixed ones are refused there, or seen as none at all.
ONE_WINDOW = ("qwen2", "qwen3", "qwen3_moe")


def plain_config(config: PuzzleConfig) -> PreTrainedConfig | None:
    """The config of the family's plain model that is the same as ``config``'s; None where there is no such model, or
    where readers of the family's models are known to misread it.
    """
    layers = range(config.num_hidden_layers)
    windows = [config.span(layer)[0] for layer in layers]
    if 1 in windows:  # transformers' own models fail with a cache then
        return None
    values: dict[str, Any] = {
        "num_key_value_heads": next(filter(None, map(config.kv_heads, layers)), None),
        "intermediate_size": next(filter(None, map(config.ffn_width, layers)), None),
    }
    experts = next(filter(None, map(config.experts, layers)), None)
    if experts is not None:
        values |= {"num_experts": experts[0], "num_experts_per_tok": experts[1]}
    if windows != [config.own_window(layer) for layer in layers]:
        if len({*windows}) > 1 and config.family in ONE_WINDOW:
            return None
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
    sizes = (config.kv_heads(layer), config.ffn_width(layer), config.experts(layer))
    rope = config.layer_type(layer) if family_of(config).rope_by_layer_type else None
    return (*sizes, config.span(layer), rope)


def export_hf(source: Source, tokenizer_dir: Path, out_dir: Path) -> None:
    """Writes ``source`` into ``out_dir``, new or empty; its weights keep the dtype that they are stored in.

    Publishing the folder as a whole is the caller's part (``puzzle.artifacts``). Raises ConfigError where ``out_dir``
    is in use or ``tokenizer_dir`` holds no tokenizer.
    """
    begin(out_dir, tokenizer_dir)
    plain = plain_config(source.config)
    (source.config if plain is None else plain).save_pretrained(out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    config |= {"dtype": source.dtype, "architectures": [_architecture(plain)]}
    if plain is None:
        config["auto_map"] = _copy_code(out_dir)
    else:
        config = _family_fields(config)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_sharded(_tensors(source, as_family=plain is not None), out_dir)
    copy_tokenizer(tokenizer_dir, out_dir)


def _architecture(plain: PreTrainedConfig | None) -> str:
    return PuzzleForCausalLM.__name__ if plain is None else str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[plain.model_type])


def _tensors(source: Source, as_family: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name on disk, ``as_family`` saves it or as our own modules call it."""
    yield from source.outer()
    for layer, blocks in enumerate(pieces(source)):
        for block in blocks:
            for name, tensor in block.tensors().items():
                full = f"model.layers.{layer}.{name}"
                yield from _single_experts(full, tensor) if as_family else [(full, tensor)]


def _single_experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Experts one by one, as checkpoints hold them: the inverse of :func:`puzzle.modeling.stock_state`."""
    prefix, _, matrix = name.rpartition(".experts.")
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(matrix) if prefix else None
    if names is None:
        yield name, tensor
        return
    for expert, weights in enumerate(tensor):
        for one, part in zip(names, weights.chunk(len(names)), strict=True):
            yield f"{prefix}.experts.{expert}.{one}.weight", part


def _copy_code(out_dir: Path) -> dict[str, str]:
    """Copies the modelling code and returns the ``auto_map`` that points to it."""
    for module in (configuration_puzzle, families_puzzle, spans_puzzle, layers_puzzle, modeling_puzzle):
        source = Path(inspect.getfile(module))
        shutil.copyfile(source, out_dir / source.name)
    classes = {"AutoConfig": PuzzleConfig, "AutoModel": PuzzleModel, "AutoModelForCausalLM": PuzzleForCausalLM}
    return {auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in classes.items()}


def _family_fields(written: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` as transformers wrote it, with the names that other readers know next to its own."""
    others = legacy_rope_fields(written.get("rope_parameters"))
    if "num_local_experts" in written:
        others["num_experts"] = written["num_local_experts"]
    return {**written, **others}
