"""The one table of model families: where a family's stock modules are, and how its layers name them.

Reads nothing but transformers' own modelling code. Everything else in the package works on the modules that the table
names; adding a family is adding a row (CONTRIBUTING.md). This file is copied as it is into exported checkpoints, so it
imports torch, transformers and its configuration only.
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.ministral import modeling_ministral
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from .configuration_puzzle import PuzzleConfig


def _embedding(config: PuzzleConfig) -> nn.Embedding:
    return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)


@dataclass(frozen=True)
class Family:
    """The stock modules of one model family: the classes of ``module`` whose names begin with ``prefix``, with the
    signatures in which transformers builds them.

    ``attention_norms`` and ``ffn_norms`` are the names within a layer of the norm before the block and of the one after
    it, None where there is none; the blocks themselves are ``self_attn`` and ``mlp`` everywhere.
    """

    module: ModuleType
    prefix: str
    own_attention: Callable[..., nn.Module] | None = None  # (config, layer_idx); None: the family's stock one
    embedding: Callable[[PuzzleConfig], nn.Embedding] = _embedding
    experts: Callable[..., nn.Module] | None = None  # (config)
    attention_norms: tuple[str, str | None] = ("input_layernorm", None)
    ffn_norms: tuple[str, str | None] = ("post_attention_layernorm", None)
    rope_by_layer_type: bool = False

    @property
    def attention(self) -> Any:  # (config, layer_idx)
        return self.own_attention or self._stock("Attention")

    @property
    def mlp(self) -> Any:  # (config)
        return self._stock("MLP")

    @property
    def norm(self) -> Any:  # (hidden_size, eps=)
        return self._stock("RMSNorm")

    @property
    def rotary(self) -> Any:  # (config)
        return self._stock("RotaryEmbedding")

    def _stock(self, name: str) -> Any:
        return getattr(self.module, self.prefix + name)


class _Llama(modeling_llama.LlamaAttention):
    """Tells the kernel about the layer's window, as all other families do by themselves."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        return base.forward(*args, sliding_window=self.config.sliding_window, **kwargs)


def _scaled_embedding(config: PuzzleConfig) -> nn.Embedding:
    embedding: nn.Embedding = modeling_gemma3.Gemma3TextScaledWordEmbedding(
        config.vocab_size, config.hidden_size, config.pad_token_id, embed_scale=config.hidden_size**0.5
    )
    return embedding


# By Hugging Face model_type. The config class of a family is transformers' own.
FAMILIES: dict[str, Family] = {
    "llama": Family(modeling_llama, "Llama", own_attention=_Llama),
    "mistral": Family(modeling_mistral, "Mistral"),
    "ministral": Family(modeling_ministral, "Ministral"),
    "qwen2": Family(modeling_qwen2, "Qwen2"),
    "qwen3": Family(modeling_qwen3, "Qwen3"),
    "gemma3_text": Family(
        modeling_gemma3,
        "Gemma3",
        embedding=_scaled_embedding,
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        rope_by_layer_type=True,
    ),
    "qwen3_moe": Family(modeling_qwen3_moe, "Qwen3Moe", experts=modeling_qwen3_moe.Qwen3MoeSparseMoeBlock),
}


def family_of(config: PuzzleConfig) -> Family:
    """The modules for ``config.family``; ValueError for a family that is not in the table."""
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def part_prefixes(config: PuzzleConfig, part: str) -> tuple[str, ...]:
    """How the names of the tensors begin that a site owns, within its layer; ``part`` is ``attention`` or ``ffn``.

    A variant without a norm after it, or without anything, has none of those.
    """
    family = family_of(config)
    norm, post_norm = family.attention_norms if part == "attention" else family.ffn_norms
    module = "self_attn" if part == "attention" else "mlp"
    return tuple(f"{name}." for name in (norm, module, post_norm) if name is not None)


# ------------------------------------------------------------------------------------- tensors as checkpoints hold them

# Around a text model: nothing in its own checkpoint, this in one cut out of a multimodal model.
_WRAPPERS = (("language_model.", ""), ("model.language_model.", "model."))
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")


def stock_state(config: PuzzleConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a stock checkpoint, by their names on disk, under the names and in the shapes of this model.

    A whole model, a layer, or any other selection that holds all experts of a layer or none. What needs no change is
    passed on as it is, so a state of this model stays what it is. ValueError where an expert is missing.

        ….experts.E.gate_proj.weight, ….experts.E.up_proj.weight   (I, D)  →  ….experts.gate_up_proj  (E, 2I, D)
        ….experts.E.down_proj.weight                               (D, I)  →  ….experts.down_proj     (E, D, I)
    """
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
    for disk_name, tensor in state.items():
        name = disk_name
        for wrapper, replacement in _WRAPPERS:
            if name.startswith(wrapper):
                name = replacement + name.removeprefix(wrapper)
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            experts.setdefault(match["experts"], {})[match["matrix"], int(match["index"])] = tensor
    for prefix, matrices in experts.items():
        count = config.num_experts
        wanted = [(matrix, index) for matrix in ("gate_proj", "up_proj", "down_proj") for index in range(count)]
        missing = [key for key in wanted if key not in matrices]
        if missing:
            matrix, index = missing[0]
            raise ValueError(f"{prefix}.{index}.{matrix}.weight is missing; a layer has {count} experts")
        gate_up = [torch.cat([matrices["gate_proj", index], matrices["up_proj", index]]) for index in range(count)]
        result[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        result[f"{prefix}.down_proj"] = torch.stack([matrices["down_proj", index] for index in range(count)])
    return result
