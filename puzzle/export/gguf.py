"""Writes a student as a GGUF file of arch ``deci``, which llama.cpp and what is built on it load.

Reads a :class:`~puzzle.export.source.Source`; writes ``model.gguf`` with the tokenizer in it, tensor by tensor, through
the package ``gguf`` (``pip install 'puzzle-nas[gguf]'``). What llama.cpp would misread is lowered (lowering.py). Rows
of q and k are permuted, since it rotates channels (2i, 2i + 1) where Llama's modules rotate (i, i + D / 2); scaled RoPE
becomes a tensor of factors that its frequencies are divided by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from puzzle.export.folder import begin
from puzzle.export.gguf_tokenizer import add_tokenizer, package
from puzzle.export.lowering import for_llama_cpp
from puzzle.export.nemotron_nas import check_model
from puzzle.export.source import Piece, Source, check_runtime, pieces
from puzzle.modeling import family_of
from puzzle.types import ConfigError, FfnSpec
from puzzle.variants import num_kv_heads

GgufType = Literal["F32", "F16", "BF16", "Q8_0"]
FILE = "model.gguf"
STORED_AS: Mapping[str, GgufType] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LARGEST_F16 = 65504.0
_ROPE = ("default", "llama3", "linear")  # those whose frequencies do not depend on the sequence
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.linear_attn.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
Layers = list[tuple[Piece, Piece]]


def is_exact(source: Source, stored_as: GgufType | None) -> bool:
    """Whether a file of that type holds the source's very numbers."""
    own = STORED_AS[source.dtype]
    return (stored_as or own) in (own, "F32")


def export_gguf(source: Source, tokenizer_dir: Path, out_dir: Path, stored_as: GgufType | None = None) -> None:
    """Writes ``source`` into ``out_dir``, new or empty, its matrices ``stored_as`` (None: as they are).

    Norms are F32; a matrix whose rows Q8_0 does not divide into blocks of 32 is F16. ConfigError for what the format
    has no word for, naming layer and variant, for a tokenizer that llama.cpp does not know, or without ``gguf``.
    """
    gguf = package()
    check_model(source.config.family_config().to_dict(), source.shape)
    check_runtime(source, "llama.cpp")
    begin(out_dir, tokenizer_dir)
    layers = for_llama_cpp(pieces(source), source.shape.hidden_size, getattr(torch, source.dtype))
    kind: GgufType = stored_as or STORED_AS[source.dtype]
    writer = gguf.GGUFWriter(out_dir / FILE, "deci")
    file_type = gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    _add_metadata(writer, source, layers, file_type)
    add_tokenizer(writer, tokenizer_dir, source.shape.vocab_size)
    for name, tensor in _tensors(source, layers):
        _announce(writer, name, tuple(tensor.shape), _type_of(name, tensor, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(source, layers):
        writer.write_tensor_data(_stored(name, tensor, _type_of(name, tensor, kind)))
    writer.close()


def _add_metadata(writer: Any, source: Source, layers: Layers, file_type: int) -> None:
    shape, config = source.shape, source.config
    attention = [piece.spec for piece, _ in layers]
    writer.add_block_count(len(layers))
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    # 0 heads: no attention; heads, but none of K and V: a linear one
    writer.add_head_count([0 if spec.kind == "skip" else shape.num_attention_heads for spec in attention])
    writer.add_head_count_kv([num_kv_heads(spec, shape) for spec in attention])
    writer.add_feed_forward_length([_width(piece, source) for _, piece in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_file_type(int(file_type))


def _width(ffn: Piece, source: Source) -> int:
    assert isinstance(ffn.spec, FfnSpec)
    return ffn.spec.intermediate_size or source.shape.intermediate_size


def _tensors(source: Source, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """All tensors by llama.cpp's names, permuted as it wants them."""
    if (factors := _rope_factors(source)) is not None:
        yield "rope_freqs.weight", factors
    for name, tensor in source.outer():
        yield _OUTER[name], tensor
    for layer, blocks in enumerate(layers):
        for block in blocks:
            for name, tensor in block.tensors().items():
                yield f"blk.{layer}.{_NAMES[name]}", _permuted(name, tensor, source.shape.head_dim)


def _permuted(name: str, tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q and k: within each head, (half, i) → (i, half)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    rows: Tensor = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return rows.transpose(1, 2).flatten(0, 2)


def _rope_factors(source: Source) -> Tensor | None:
    """(D / 2,): what plain RoPE's frequencies are divided by; None where it is plain."""
    kind = source.config.rope_parameters.get("rope_type", "default")
    if kind not in _ROPE:
        raise ConfigError(f"RoPE of type {kind!r} cannot be written as GGUF; those that can: {', '.join(_ROPE)}")
    if kind == "default":
        return None
    rotary: Any = family_of(source.config).rotary(config=source.config.family_config())
    size, theta = source.shape.head_dim, float(source.config.rope_parameters["rope_theta"])
    plain = theta ** -(torch.arange(0, size, 2).double() / size)
    factors: Tensor = (plain / rotary.inv_freq.double()).float()
    return factors


def _type_of(name: str, tensor: Tensor, kind: GgufType) -> GgufType:
    if tensor.dim() == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and tensor.shape[-1] % 32 else kind


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: GgufType) -> None:
    gguf = package()
    quant = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if kind == "F32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, quant)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=quant)


def _stored(name: str, tensor: Tensor, kind: GgufType) -> Any:
    gguf = package()
    if kind == "F16" and float(tensor.abs().max()) > LARGEST_F16:
        raise ConfigError(f"{name} holds values that F16 cannot; export it as BF16 or F32")
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
