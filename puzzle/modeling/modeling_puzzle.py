"""The heterogeneous decoder: a family's own modules, in layers that each have their own attention and FFN, or none.

Reads a :class:`PuzzleConfig`; computes logits. Tensors are named as in the family's stock model, so that a model that
keeps every layer loads the teacher's weights as they are. This file is copied as it is into exported checkpoints, so it
imports torch, transformers and its neighbours only.

Layers may see different spans of the sequence (a window, first tokens that stay visible), so masks come in a dict by
span; rotary tables may differ by kind of layer, so they come in a dict by key. A layer takes its own out of each. The
KV cache has one slot per layer with real attention.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_puzzle import PuzzleConfig, Span
from .families_puzzle import family_of
from .layers_puzzle import Masks, PuzzleDecoderLayer
from .spans_puzzle import local_causal_mask, make_slot, note_padding, span_mask

__all__ = ["PuzzleDecoderLayer", "PuzzleForCausalLM", "PuzzleModel", "PuzzlePreTrainedModel", "local_causal_mask"]


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
    _supports_context_parallel = False  # it would ignore the layers' windows
    # Transformers looks for "@use_experts_implementation" in this file to see whether kernels for experts can be
    # chosen; the families' experts are decorated with it where they are defined.

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """As the base class does it, and then what only the families' own base classes know."""
        super()._init_weights(module)
        family = family_of(self.config)
        if isinstance(module, family.norm):
            with torch.device("cpu"):
                fresh: Any = family.norm(1)
            weight: Any = module.weight
            init.constant_(weight, float(fresh.weight))  # Gemma's is 0 where others have 1
        elif isinstance(module, family.rotary):
            with torch.device("cpu"):
                fresh = family.rotary(self.config.family_config())
            for name, buffer in fresh.named_buffers():
                init.copy_(getattr(module, name), buffer)
        elif hasattr(module, "scalar_embed_scale"):
            init.constant_(module.embed_scale, module.scalar_embed_scale)
        elif not isinstance(module, (nn.Linear, nn.Embedding)):  # experts and their router
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, layers, final norm. ``embed_tokens(ids)`` is what the first layer reads, scaled where the family does.

    ``slots`` are the spans of the layers with real attention, in the order of their KV-cache slots.
    """

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        family = family_of(config)
        self.embed_tokens = family.embedding(config)
        self.layers = nn.ModuleList(
            PuzzleDecoderLayer(config, layer_idx, config.cache_idx(layer_idx))
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family.rotary(config=config.family_config())
        attending = [layer for layer in range(config.num_hidden_layers) if config.kv_heads(layer) is not None]
        self.slots: tuple[Span, ...] = tuple(config.span(layer) for layer in attending)
        self.gradient_checkpointing = False
        self.post_init()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PuzzleModel:
        """Moves and casts as ever, but leaves RoPE's frequencies in fp32, as from_pretrained does.

        ``model.to(torch.bfloat16)`` would round them by up to 0.4 %, which is whole turns at long contexts. The same
        for the scale of the embeddings, if there is one.
        """
        exact = {module: dict(module.named_buffers()) for module in (self.rotary_emb, self.embed_tokens)}
        super()._apply(fn, recurse)
        for module, buffers in exact.items():
            for name, buffer in buffers.items():
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(getattr(module, name).device))
        return self

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The tables for ``position_ids`` (1 or B, T), by the layers' ``rope``; ``hidden`` says dtype and device."""
        if not family_of(self.config).rope_by_layer_type:
            return {"default": self.rotary_emb(hidden, position_ids=position_ids)}
        kinds: Any = self.rotary_emb.layer_types
        return {kind: self.rotary_emb(hidden, position_ids=position_ids, layer_type=kind) for kind in kinds}

    def masks(
        self,
        hidden: torch.Tensor,  # (B, T, any)
        attention_mask: torch.Tensor | None,  # (B, tokens seen + T)
        past_key_values: Any,
        position_ids: torch.Tensor | None,
        spans: Iterable[Span] | None = None,
    ) -> dict[Span, Any]:
        """One mask for each of ``spans`` (default: all that occur)."""
        note_padding(past_key_values, hidden, attention_mask)
        return {
            span: span_mask(
                span, self.slots.index(span), hidden, self.config, attention_mask, past_key_values, position_ids
            )
            for span in dict.fromkeys(self.slots if spans is None else spans)
        }

    def new_cache(self) -> DynamicCache:
        """A growing KV cache with one slot per real attention, which keeps no more than its span has use for.

        What transformers would build from the config keeps everything in every slot: as right, but larger.
        """
        cache = DynamicCache()
        cache.layers = [make_slot(span) for span in self.slots]
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, T)
        attention_mask: Masks | torch.Tensor | None = None,  # (B, tokens seen + T), or masks by span
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
        if "cache" in kwargs and any(window is not None for window, _ in self.slots):
            raise ValueError("continuous batching is not available: its paged cache would ignore the layers' windows")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if position_ids is None:
            seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen_tokens).unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, Mapping):
            masks = self.masks(hidden, masks, past_key_values, position_ids)
        position_embeddings = self.rotary(hidden, position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[torch.Tensor] = []
        for layer in self.layers:
            states += [hidden] if output_hidden_states else []
            hidden = layer(
                hidden,
                attention_mask=masks,
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

    def create_masks_for_generate(
        self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Any, position_ids: Any = None, **_: Any
    ) -> dict[Span, Any]:
        """What ``generate`` calls in place of its own function, which knows one mask per type of layer only."""
        masks: dict[Span, Any] = self.model.masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        return masks

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As ever; but where that makes a plain growing cache, this model's own, which keeps less, takes its place."""
        given = model_kwargs.get("past_key_values")
        base: Any = super()
        result = base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and type(made) is DynamicCache and not made.offloading and not generation_config.is_assistant:
            model_kwargs["past_key_values"] = self.model.new_cache()
        return result

    def _get_static_cache_init_shape(self) -> None:
        """None: a static cache takes each slot's shape from what is first put in it."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Masks | torch.Tensor | None = None,
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
