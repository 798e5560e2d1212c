"""The heterogeneous decoder: a family's own modules, in layers that each have their own attention and FFN, or none.

Reads a :class:`PuzzleConfig`; computes logits. Tensors are named as in the family's stock model, so that a model that
keeps every layer loads the teacher's weights as they are; the two further names are ``self_attn.linear_attn.weight``
and ``mlp.linear_mlp.weight``. A skipped part has no modules at all, not even its norm. This file is copied as it is
into exported checkpoints, so it imports torch, transformers and its configuration only.

    x  = x + attention_delta(x)      a site adds a delta to the residual stream; its pre-norm is inside
    x  = x + ffn_delta(x)

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.utils.generic import can_return_tuple

from .configuration_puzzle import PuzzleConfig


@dataclass(frozen=True)
class Family:
    """The stock modules of one model family, with the signatures in which transformers builds them."""

    attention: Callable[..., nn.Module]  # (config, layer_idx)
    mlp: Callable[..., nn.Module]  # (config)
    norm: Callable[..., nn.Module]  # (hidden_size, eps=)
    rotary: Callable[..., nn.Module]  # (config)


# The one place that knows a model family, by its Hugging Face model_type. Its config class is transformers' own.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        attention=modeling_llama.LlamaAttention,
        mlp=modeling_llama.LlamaMLP,
        norm=modeling_llama.LlamaRMSNorm,
        rotary=modeling_llama.LlamaRotaryEmbedding,
    ),
}


def family_of(config: PuzzleConfig) -> Family:
    """The modules for ``config.family``; ValueError for a family that is not in the table."""
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


# Not "…Attention": transformers takes a module of that name for one with its own backends, and then refuses
# set_attn_implementation() for the whole model.
class LinearAttn(nn.Module):
    """One matrix in place of the attention: each token sees itself only."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear_attn(hidden)
        return output


class LinearMlp(nn.Module):
    """One matrix in place of the FFN."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear_mlp(hidden)
        return output


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """Layer ``layer_idx`` of ``config``, also usable alone; ``cache_idx`` is its KV-cache slot (see PuzzleConfig).

    Alone, ``config._attn_implementation`` must be set, as a PreTrainedModel does for its config.
    """

    def __init__(self, config: PuzzleConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        family, layer_config = family_of(config), config.layer_config(layer_idx)
        block = config._blocks[layer_idx]
        self.config = config
        self.layer_idx = layer_idx
        self.attention_kind: str = block["attention"]["kind"]
        self.ffn_kind: str = block["ffn"]["kind"]

        if self.attention_kind != "skip":
            self.input_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
            if self.attention_kind == "linear":
                self.self_attn: nn.Module = LinearAttn(config)
            else:
                self.self_attn = family.attention(layer_config, layer_idx)
                self.self_attn.layer_idx = cache_idx  # type: ignore[assignment]
                # The shared config, so that model.set_attn_implementation() reaches every layer.
                self.self_attn.config = config  # type: ignore[assignment]
        if self.ffn_kind != "skip":
            self.post_attention_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp: nn.Module = LinearMlp(config) if self.ffn_kind == "linear" else family.mlp(layer_config)

    def attention_delta(
        self,
        hidden: torch.Tensor,  # (B, T, D)
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # (B, T, D)
        """What the attention site adds to the residual stream; for skip a zero without memory (read only).

        Without a mask the attention is causal: unpadded sequences from their first token on, or one further token on
        a filled cache. Anything else, and the eager implementation always, needs a mask; ValueError where this shows.
        ``past_key_values`` needs only ``update(k, v, cache_idx)``; linear and skip use neither it nor the positions.
        """
        if self.attention_kind == "skip":
            return hidden.new_zeros(()).expand_as(hidden)
        normed = self.input_layernorm(hidden)
        if self.attention_kind == "linear":
            delta: torch.Tensor = self.self_attn(normed)
            return delta
        implementation = self.config._attn_implementation
        if attention_mask is None and implementation in (None, "eager") and hidden.shape[1] > 1:
            raise ValueError(
                f"layer {self.layer_idx}: attention {implementation!r} is not causal without a mask; "
                "give one, or set config._attn_implementation = 'sdpa'"
            )
        delta, _ = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return delta

    def ffn_delta(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the FFN site adds to the residual stream, (B, T, D); for skip as in :meth:`attention_delta`."""
        if self.ffn_kind == "skip":
            return hidden.new_zeros(()).expand_as(hidden)
        delta: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return delta

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.attention_kind != "skip":
            delta = self.attention_delta(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
            hidden_states = hidden_states + delta
        if self.ffn_kind != "skip":
            hidden_states = hidden_states + self.ffn_delta(hidden_states)
        return hidden_states


class PuzzlePreTrainedModel(PreTrainedModel):
    config: PuzzleConfig
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        family = family_of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            PuzzleDecoderLayer(config, layer_idx, config.cache_idx(layer_idx))
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family.rotary(config=config)
        self.has_attention = any(config.num_kv_heads(layer) is not None for layer in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PuzzleModel:
        """Moves and casts as ever, but leaves RoPE's frequencies in fp32, as from_pretrained does.

        ``model.to(torch.bfloat16)`` would round them by up to 0.4 %, which is whole turns at long contexts.
        """
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self.rotary_emb, name, buffer.to(getattr(self.rotary_emb, name).device))
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, tokens seen + T)
        position_ids: torch.Tensor | None = None,  # (B, T)
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,  # (B, T, D)
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """``hidden_states``, if asked for: the embeddings and the output of every layer, the last one normed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not available: not every layer has attention weights")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen_tokens).unsqueeze(0)
        mask = None
        if self.has_attention:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[torch.Tensor] = []
        for layer in self.layers:
            states += [hidden] if output_hidden_states else []
            hidden = layer(
                hidden,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """:class:`PuzzleModel` with the language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,  # (B, T), shifted inside
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the last ``logits_to_keep`` positions (0: all; a tensor: those positions)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
