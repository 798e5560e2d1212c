"""One layer of the heterogeneous decoder: a family's own attention and FFN, either of them replaced or absent.

Reads a :class:`PuzzleConfig`; computes what a layer adds to the residual stream. Tensors are named as in the family's
stock model; the two further names are ``self_attn.linear_attn.weight`` and ``mlp.linear_mlp.weight``. A skipped part
has no modules at all, not even its norms, and a linear one has none after it. This file is copied as it is into
exported checkpoints, so it imports torch, transformers and its neighbours only.

    x  = x + attention_delta(x)      a site adds a delta to the residual stream; its norms are inside
    x  = x + ffn_delta(x)

Shapes: B batch, T tokens, D hidden size.
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_puzzle import PuzzleConfig, Span
from .families_puzzle import family_of
from .spans_puzzle import remembered_mask

Rotary = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # by key (cos, sin), each (1 or B, T, head_dim)
Masks = Mapping[Span, Any]  # a value may be None, as transformers says that its kernel needs none


# Its name is not "…Attention": transformers takes a module of that name for one with its own backends, and then refuses
# set_attn_implementation() for the whole model.
class LinearBlock(nn.Module):
    """One matrix, called ``name``, in place of the attention or the FFN: each token sees itself only."""

    def __init__(self, config: PuzzleConfig, name: str) -> None:
        super().__init__()
        self.matrix_name = name
        self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.get_submodule(self.matrix_name)(hidden)
        return output


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """Layer ``layer_idx`` of ``config``, also usable alone; ``cache_idx`` is its KV-cache slot (see PuzzleConfig).

    ``rope`` is the key of its rotary tables, ``span`` what its attention sees. Alone, ``config._attn_implementation``
    must be set, as a PreTrainedModel does for its config.
    """

    def __init__(self, config: PuzzleConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        family, layer_config = family_of(config), config.layer_config(layer_idx)
        block = config._blocks[layer_idx]
        self.config = config
        self.layer_idx = layer_idx
        self.attention_kind: str = block["attention"]["kind"]
        self.ffn_kind: str = block["ffn"]["kind"]
        self.rope = config.layer_type(layer_idx) if family.rope_by_layer_type else "default"
        self.span = config.span(layer_idx)
        self._norms = {"attention": family.attention_norms, "ffn": family.ffn_norms}

        def add_norm(name: str | None) -> None:
            if name is not None:
                setattr(self, name, family.norm(config.hidden_size, eps=config.rms_norm_eps))

        if self.attention_kind != "skip":
            add_norm(family.attention_norms[0])
            if self.attention_kind == "linear":
                self.self_attn: nn.Module = LinearBlock(config, "linear_attn")
            else:
                self.self_attn = family.attention(layer_config, layer_idx)
                self.self_attn.layer_idx = cache_idx  # type: ignore[assignment]
                add_norm(family.attention_norms[1])
        if self.ffn_kind != "skip":
            add_norm(family.ffn_norms[0])
            if self.ffn_kind == "linear":
                self.mlp: nn.Module = LinearBlock(config, "linear_mlp")
            else:
                has_experts = family.experts is not None and config.has_experts(layer_idx)
                self.mlp = (family.experts if has_experts else family.mlp)(layer_config)  # type: ignore[misc]
                add_norm(family.ffn_norms[1])

    def norm_of(self, part: str) -> nn.Module | None:
        """The norm before the block of ``attention`` or ``ffn``; None where the part is skipped."""
        return getattr(self, self._norms[part][0], None)

    def post_norm_of(self, part: str) -> nn.Module | None:
        """The norm after the block; None where there is none."""
        name = self._norms[part][1]
        return None if name is None else getattr(self, name, None)

    def attention_delta(
        self,
        hidden: torch.Tensor,  # (B, T, D)
        position_embeddings: Rotary | None,
        attention_mask: Masks | torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # (B, T, D)
        """What the attention site adds to the residual stream; for skip a zero without memory (read only).

        A mask is bool, true where a token attends, or what transformers makes for the attention implementation. Without
        masks the attention is causal within its span: unpadded sequences from their first token on, or, if it has no
        window, one further token on a filled cache. Anything else, and implementations other than SDPA and flash
        attention always, need a mask; ValueError where this shows. ``past_key_values`` needs only ``update(k, v,
        cache_idx)``; linear and skip use neither it nor the positions.
        """
        if self.attention_kind == "skip":
            return hidden.new_zeros(()).expand_as(hidden)
        normed = self._normed("attention", hidden)
        if self.attention_kind == "linear":
            delta: torch.Tensor = self.self_attn(normed)
            return delta
        assert position_embeddings is not None
        if isinstance(attention_mask, Mapping):
            attention_mask = attention_mask[self.span]
        elif attention_mask is None:
            attention_mask = self._own_mask(hidden, past_key_values)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dtype == torch.bool:
            attention_mask = self._as_the_kernel_takes_it(attention_mask, hidden.dtype)
        delta, _ = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings[self.rope],
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self._post_normed("attention", delta)

    def ffn_delta(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the FFN site adds to the residual stream, (B, T, D); for skip as in :meth:`attention_delta`."""
        if self.ffn_kind == "skip":
            return hidden.new_zeros(()).expand_as(hidden)
        return self._post_normed("ffn", self.mlp(self._normed("ffn", hidden)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Masks | torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Rotary | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.attention_kind != "skip":
            delta = self.attention_delta(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
            hidden_states = hidden_states + delta
        if self.ffn_kind != "skip":
            hidden_states = hidden_states + self.ffn_delta(hidden_states)
        return hidden_states

    def _normed(self, part: str, hidden: torch.Tensor) -> torch.Tensor:
        norm = self.norm_of(part)
        assert norm is not None  # asked for parts only that are not skipped
        output: torch.Tensor = norm(hidden)
        return output

    def _post_normed(self, part: str, delta: torch.Tensor) -> torch.Tensor:
        norm = self.post_norm_of(part)
        return delta if norm is None else norm(delta)

    def _as_the_kernel_takes_it(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A bool mask as numbers for the implementations that add it to the scores."""
        if self.config._attn_implementation not in ("eager", "flex_attention"):
            return mask
        return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)

    def _own_mask(self, hidden: torch.Tensor, past_key_values: Any) -> torch.Tensor | None:
        """The mask of a layer that was given none; None where the kernel's own causal one will do."""
        implementation, num_tokens = self.config._attn_implementation or "eager", hidden.shape[1]
        window, sinks = self.span
        is_flash = "flash" in implementation
        if not is_flash and implementation != "sdpa" and num_tokens > 1:
            raise ValueError(
                f"layer {self.layer_idx}: attention {implementation!r} is not causal without a mask; "
                "give one, or set config._attn_implementation = 'sdpa'"
            )
        if window is None:
            return None
        if past_key_values is not None or (is_flash and sinks):
            raise ValueError(f"layer {self.layer_idx}: a window on top of a cache, or with sinks, needs a mask")
        return None if is_flash or num_tokens <= window else remembered_mask(num_tokens, self.span, hidden.device)
