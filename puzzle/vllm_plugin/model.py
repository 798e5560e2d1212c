"""The heterogeneous decoder in vLLM's own layers: tensor and pipeline parallel, compiled, a paged KV cache per layer.

Reads a :class:`PuzzleConfig` and the tensors of an ``hf`` export by their names there; computes logits. Each layer is
built after the one that transformers would run, made without memory (:class:`PuzzleDecoderLayer` on the meta device):
what a family's layers are, its biases, norms and scales, is read off that one, so this file knows no families. A layer
has the KV heads of its own and caches no more; one without attention has no cache.

    x = x + attention(norm(x));  x = x + ffn(norm(x))      either may be absent, and its norm with it

vLLM adds the residual within the next norm: ``hidden`` is what the last block added, ``residual`` all before, None
before the first block. Shapes: N tokens of all sequences, D hidden size.
"""

# mypy: allow-subclassing-any, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer, family_of
from puzzle.vllm_plugin import check


def make_norm(config: PuzzleConfig, size: int) -> Any:
    """vLLM's norm in the place of the family's; Gemma's gain counts from 1, and starts as 0."""
    with torch.device("cpu"):
        is_gemma = family_of(config).norm(1).weight.item() == 0
    return (GemmaRMSNorm if is_gemma else RMSNorm)(size, eps=config.rms_norm_eps)


def normed(norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(normed sum, sum) of both."""
    return (norm(hidden), hidden) if residual is None else norm(hidden, residual)


class PuzzleAttention(nn.Module):
    """As ``stock``, the family's module without memory, has it."""

    def __init__(self, stock: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: PuzzleConfig = vllm_config.model_config.hf_config
        quantised, layer = vllm_config.quant_config, extract_layer_index(prefix)
        num_heads, size = config.num_attention_heads, stock.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            num_heads,
            config.kv_heads(layer),
            bias=stock.q_proj.bias is not None,
            quant_config=quantised,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * size,
            config.hidden_size,
            bias=stock.o_proj.bias is not None,
            quant_config=quantised,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = make_norm(config, size) if hasattr(stock, "q_norm") else None
        self.k_norm: Any = make_norm(config, size) if hasattr(stock, "k_norm") else None
        rope = config.family_config().rope_parameters
        self.rotary_emb = get_rope(
            size,
            max_position=config.max_position_embeddings,
            rope_parameters=rope.get(config.layer_type(layer), rope),
        )
        own_heads, own_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads  # on this device
        self.sizes = [own_heads * size, own_kv_heads * size, own_kv_heads * size]
        self.head_dim = size
        self.attn = Attention(
            own_heads,
            size,
            stock.scaling,
            num_kv_heads=own_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantised,
            per_layer_sliding_window=config.span(layer)[0],
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(hidden)[0].split(self.sizes, dim=-1)
        if self.q_norm is not None:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        output: Tensor = self.o_proj(self.attn(query, key, value))[0]
        return output


class PuzzleLinear(nn.Module):
    """One matrix, called ``name``, in place of a block."""

    def __init__(self, name: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        size, quantised = vllm_config.model_config.hf_config.hidden_size, vllm_config.quant_config
        matrix = RowParallelLinear(
            size, size, bias=False, input_is_parallel=False, quant_config=quantised, prefix=f"{prefix}.{name}"
        )
        self.name = name
        self.add_module(name, matrix)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.get_submodule(self.name)(hidden)[0]
        return output


class PuzzleFfn(nn.Module):
    """A gated FFN, as ``stock`` has it."""

    def __init__(self, stock: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantised = vllm_config.model_config.hf_config, vllm_config.quant_config
        width, bias = stock.up_proj.out_features, stock.up_proj.bias is not None
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=bias, quant_config=quantised, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, config.hidden_size, bias=bias, quant_config=quantised, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = get_act_and_mul_fn(getattr(config, "hidden_activation", None) or config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_up_proj(hidden)[0]))[0]
        return output


class PuzzleExperts(nn.Module):
    """A mixture of as many experts as the layer has."""

    def __init__(self, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        num_experts, num_active = config.experts(layer)
        self.gate = ReplicatedLinear(config.hidden_size, num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=num_experts,
            top_k=num_active,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            activation=config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.experts(hidden_states=hidden, router_logits=self.gate(hidden)[0])
        return output


class PuzzleLayer(nn.Module):
    """Layer ``prefix`` ends with; modules and norms are named as in the export, and absent where it has none."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: PuzzleConfig = vllm_config.model_config.hf_config
        layer = extract_layer_index(prefix)
        with torch.device("meta"):
            stock = PuzzleDecoderLayer(config, layer, layer)
        self.kinds = stock.attention_kind, stock.ffn_kind
        self.norms = family_of(config).attention_norms, family_of(config).ffn_norms
        for name in (name for pair in self.norms for name in pair if name is not None):
            if hasattr(stock, name):
                self.add_module(name, make_norm(config, config.hidden_size))
        if stock.attention_kind == "linear":
            self.self_attn: Any = PuzzleLinear("linear_attn", vllm_config, f"{prefix}.self_attn")
        elif stock.attention_kind != "skip":
            self.self_attn = PuzzleAttention(stock.self_attn, vllm_config, f"{prefix}.self_attn")
        if stock.ffn_kind == "linear":
            self.mlp: Any = PuzzleLinear("linear_mlp", vllm_config, f"{prefix}.mlp")
        elif config.experts(layer) is not None:
            self.mlp = PuzzleExperts(layer, vllm_config, f"{prefix}.mlp")
        elif stock.ffn_kind != "skip":
            self.mlp = PuzzleFfn(stock.mlp, vllm_config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (attention, ffn), (attention_norms, ffn_norms) = self.kinds, self.norms
        if attention != "skip":
            hidden, residual = normed(getattr(self, attention_norms[0]), hidden, residual)
            hidden = self.self_attn(hidden) if attention == "linear" else self.self_attn(positions, hidden)
            hidden = self._post_normed(attention_norms[1], hidden)
        if ffn != "skip":
            hidden, residual = normed(getattr(self, ffn_norms[0]), hidden, residual)
            hidden = self._post_normed(ffn_norms[1], self.mlp(hidden))
        return hidden, residual

    def _post_normed(self, name: str | None, hidden: Tensor) -> Tensor:
        return hidden if name is None or not hasattr(self, name) else getattr(self, name)(hidden)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class PuzzleModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: PuzzleConfig = vllm_config.model_config.hf_config
        check(config, get_tensor_model_parallel_world_size())
        here = get_pp_group()
        has_embedding = here.is_first_rank or (config.tie_word_embeddings and here.is_last_rank)
        self.embed_tokens: Any = PPMissingLayer()
        if has_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        with torch.device("meta"):
            self.embedding_scale = getattr(family_of(config).embedding(config), "scalar_embed_scale", None)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: PuzzleLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm: Any = make_norm(config, config.hidden_size) if here.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(input_ids)
        if self.embedding_scale is None:
            return embedded
        return embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype)  # rounded, as transformers does

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        residual: Tensor | None = None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        elif inputs_embeds is not None:
            hidden = inputs_embeds
        else:
            assert input_ids is not None
            hidden = self.embed_input_ids(input_ids)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            before = torch.zeros_like(hidden) if residual is None else residual
            return IntermediateTensors({"hidden_states": hidden, "residual": before})
        return normed(self.norm, hidden, residual)[0]


class PuzzleForCausalLM(DeciLMForCausalLM):
    """What vLLM loads for an export's architecture of that name: head, loading, LoRA and pipelines as vLLM has them for
    its own model with such layers."""

    has_noops = False  # vLLM would count them in a field that this configuration does not have
    hf_to_vllm_mapper = WeightsMapper(  # as there, but for the experts, whose names end alike
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> PuzzleModel:
        return PuzzleModel(vllm_config=vllm_config, prefix=prefix)
