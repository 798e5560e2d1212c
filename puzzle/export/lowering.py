"""What a reader cannot take, said in other words that compute the same: zeros in the place of nothing, a layer more.

Pieces in, pieces out; every rewriting here is exact. Which reader needs which is ``capabilities.MATRIX``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from puzzle.capabilities import ZERO_FFN, ZERO_WIDTH, stored_width
from puzzle.export.source import Piece
from puzzle.types import AttentionSpec, FfnSpec, ModelShape

LINEAR = AttentionSpec("linear")


def padded(ffn: Piece, shape: ModelShape) -> Piece:
    """The FFN with channels of zeros up to the width that readers of nemotron-nas round to."""
    spec = ffn.spec
    assert isinstance(spec, FfnSpec)
    width = spec.intermediate_size or shape.intermediate_size
    more = stored_width(width) - width
    if spec.kind not in ("keep", "narrow") or not more:
        return ffn

    def tensors() -> Mapping[str, Tensor]:
        return {name: _wider(name, tensor, more) for name, tensor in ffn.tensors().items()}

    return Piece(replace(spec, kind="narrow", intermediate_size=width + more), tensors)


def _wider(name: str, tensor: Tensor, more: int) -> Tensor:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return torch.cat([tensor, tensor.new_zeros(more, tensor.shape[1])])
    if name.endswith("down_proj.weight"):
        return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], more)], dim=1)
    return tensor


def for_llama_cpp(
    layers: Sequence[tuple[Piece, Piece]], hidden_size: int, dtype: torch.dtype
) -> list[tuple[Piece, Piece]]:
    """Layers that llama.cpp's ``deci`` computes as they are meant. It would drop the attention of a layer without FFN,
    abort at a last layer of nothing, fail to load a first one without attention, and knows no linear FFN.
    """
    no_ffn, no_attention = _zero_ffn(hidden_size, dtype), _zero_attention(hidden_size, dtype)
    nothing = Piece(AttentionSpec("skip"), dict)
    written: list[tuple[Piece, Piece]] = []
    for attention, ffn in layers:
        attends = attention.spec.kind != "skip"
        if ffn.spec.kind == "linear":
            written += [(attention, no_ffn)] if attends else []
            written.append((_ffn_as_attention(ffn), no_ffn))
        elif ffn.spec.kind != "skip":
            written.append((attention if attends else nothing, ffn))
        elif attends:
            written.append((attention, no_ffn))
    if not written or written[0][0].spec.kind == "skip":
        written[:1] = [(no_attention, written[0][1] if written else no_ffn)]
    return written


def _ffn_as_attention(ffn: Piece) -> Piece:
    """A linear FFN as the linear attention of a layer of its own: the same norm, the same matrix."""
    names = {
        "post_attention_layernorm.weight": "input_layernorm.weight",
        "mlp.linear_mlp.weight": "self_attn.linear_attn.weight",
    }
    return Piece(LINEAR, lambda: {names[name]: tensor for name, tensor in ffn.tensors().items()})


def _zero_ffn(hidden_size: int, dtype: torch.dtype) -> Piece:
    shapes = {
        "gate_proj": (ZERO_WIDTH, hidden_size),
        "up_proj": (ZERO_WIDTH, hidden_size),
        "down_proj": (hidden_size, ZERO_WIDTH),
    }

    def tensors() -> Mapping[str, Tensor]:
        norm = {"post_attention_layernorm.weight": torch.ones(hidden_size, dtype=dtype)}
        return norm | {f"mlp.{name}.weight": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    return Piece(ZERO_FFN, tensors)


def _zero_attention(hidden_size: int, dtype: torch.dtype) -> Piece:
    def tensors() -> Mapping[str, Tensor]:
        zeros = torch.zeros(hidden_size, hidden_size, dtype=dtype)
        return {"input_layernorm.weight": torch.ones(hidden_size, dtype=dtype), "self_attn.linear_attn.weight": zeros}

    return Piece(LINEAR, tensors)
