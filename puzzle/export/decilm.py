"""Writes a student as a nemotron-nas (DeciLM) folder: what vLLM, SGLang, TensorRT-LLM and mlx-lm load as it is.

Reads a :class:`~puzzle.export.source.Source`; writes safetensors under Llama's names, ``config.json`` with
``block_configs``, its config class and the tokenizer. FFNs are padded to the widths that readers round to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from puzzle.export.folder import begin, copy_tokenizer
from puzzle.export.lowering import padded
from puzzle.export.nemotron_nas import CONFIG_CODE, nemotron_nas_config
from puzzle.export.shards import write_sharded
from puzzle.export.source import Source, check_runtime, pieces
from puzzle.types import ConfigError

MLX_NAMES = {"self_attn.linear_attn.weight": "self_attn.linear.weight", "mlp.linear_mlp.weight": "mlp.linear.weight"}


def export_nemotron_nas(source: Source, tokenizer_dir: Path, out_dir: Path) -> None:
    """Writes ``source`` into ``out_dir``, new or empty; weights keep their dtype.

    ConfigError, naming layer and variant, for what the format has no word for; else as ``hf.export_hf``.
    """
    _export(source, tokenizer_dir, out_dir, {})


def export_mlx(source: Source, tokenizer_dir: Path, out_dir: Path) -> None:
    """The same with mlx-lm's names for linear blocks, which no other reader knows."""
    shape = source.shape
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        raise ConfigError(
            f"mlx-lm's nemotron-nas has heads of hidden_size / num_attention_heads, and the teacher's have "
            f"{shape.head_dim} channels; export it as hf"
        )
    if all(attention.kind == "skip" for attention, _ in source.layers):
        raise ConfigError(
            "mlx-lm cannot load a model without any attention; search with layers_with_attention: {min: 1}"
        )
    check_runtime(source, "mlx-lm")
    _export(source, tokenizer_dir, out_dir, MLX_NAMES)


def _export(source: Source, tokenizer_dir: Path, out_dir: Path, names: Mapping[str, str]) -> None:
    family = source.config.family_config().to_dict()
    config = nemotron_nas_config(
        family, source.shape, source.layers, source.dtype
    )  # refuses before anything is written
    begin(out_dir, tokenizer_dir)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(Path(__file__).with_name(f"{CONFIG_CODE}.py"), out_dir / f"{CONFIG_CODE}.py")
    write_sharded(_tensors(source, names), out_dir)
    copy_tokenizer(tokenizer_dir, out_dir)


def _tensors(source: Source, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    yield from source.outer()
    for layer, (attention, ffn) in enumerate(pieces(source)):
        for block in (attention, padded(ffn, source.shape)):
            for name, tensor in block.tensors().items():
                yield f"model.layers.{layer}.{names.get(name, name)}", tensor
