"""What attention sees: the masks of layers with windows and sinks, and what a KV cache must keep for them.

A span is a window in tokens (None: everything before) and a number of sinks, the first tokens of the sequence that stay
visible beyond the window. Reads nothing; computes masks, makes cache slots. This file is copied as it is into exported
checkpoints, so it imports torch, transformers and its configuration only.

Shapes: B batch, T new tokens, K keys held and new, H heads.
"""

# transformers is typed in parts only.
# mypy: allow-untyped-calls

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from .configuration_puzzle import LayerConfig, PuzzleConfig, Span


def local_causal_mask(
    num_tokens: int,
    span: Span,
    device: torch.device,
    documents: torch.Tensor | None = None,  # (B, T)
) -> torch.Tensor:  # (1 or B, 1, T, T)
    """True where a token attends: to itself and what came before it, as far as ``span`` lets it see.

    With ``documents``, tokens see those of their own document only, whose first tokens stay visible then; a document's
    tokens stand together.
    """
    window, sinks = span
    query = torch.arange(num_tokens, device=device)[:, None]
    key = query.T
    mask, begin = (key <= query)[None], torch.zeros((), dtype=torch.long, device=device)
    if documents is not None:
        same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
        mask = mask & same
        if sinks:
            begin = same.byte().argmax(-1, keepdim=True)  # (B, T, 1)
    if window is not None:
        mask = mask & ((key > query - window) | (key < begin + sinks))
    return mask.unsqueeze(1)


@functools.lru_cache(maxsize=4)
def remembered_mask(num_tokens: int, span: Span, device: torch.device) -> torch.Tensor:
    """:func:`local_causal_mask` for layers that are called again and again."""
    with torch.inference_mode(False):  # it outlives this call, and autograd refuses what inference made
        return local_causal_mask(num_tokens, span, device)


class SpanSlot(DynamicLayer):
    """A slot that keeps the first tokens of the sequence and the last ``window - 1``, and drops those between.

    ``first_tokens`` are the sinks; with padding on the left as many more, so that every row's are among them. For a
    window without sinks transformers has a slot of its own.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.window, self.sinks = span[0] or 1, span[1]
        self.first_tokens = self.sinks
        self.seen_tokens = 0
        self.drops = True

    @property
    def gap(self) -> int:
        """Tokens that were dropped."""
        return self.seen_tokens - self.get_mask_sizes(0)[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new tokens (B, H, T, head_dim); gives all that were held, and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = self._kept(keys), self._kept(values)
        return keys, values

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        last = states.shape[-2] - (self.window - 1)
        if not self.drops or last <= self.first_tokens:
            return states
        return torch.cat([states[..., : self.first_tokens, :], states[..., last:, :]], dim=-2)

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.keys.shape[-2] if self.is_initialized else 0
        return held + query_length, 0

    def activate_past_recording(self) -> None:
        """From now on nothing is dropped, so that ``crop`` can take back what was added."""
        self.drops = False

    def crop(self, tokens: int) -> None:
        """Removes ``-tokens`` tokens, or, as older releases ask for it, all but ``tokens``."""
        surplus = self.seen_tokens - tokens if tokens > 0 else -tokens
        if surplus <= 0:
            return
        if self.drops and self.gap:
            raise ValueError("tokens that a window has dropped cannot be brought back")
        held = self.get_mask_sizes(0)[0]
        self.keys, self.values = self.keys[..., : held - surplus, :], self.values[..., : held - surplus, :]
        self.seen_tokens -= surplus

    def reset(self) -> None:
        """As it was when it was made."""
        self.keys = self.values = None
        self.is_initialized, self.seen_tokens, self.first_tokens = False, 0, self.sinks


def make_slot(span: Span) -> DynamicLayer:
    """A growing cache slot that keeps no more than attention with this span has use for."""
    window, sinks = span
    if window is None:
        return DynamicLayer()
    if sinks or window == 1:  # of one token transformers' own would keep all
        return SpanSlot(span)
    return DynamicSlidingWindowLayer(sliding_window=window)


def span_mask(
    span: Span,
    slot_idx: int,
    hidden: torch.Tensor,  # (B, T, any)
    config: PuzzleConfig,
    attention_mask: torch.Tensor | None,  # (B, tokens seen + T)
    past_key_values: Any,
    position_ids: torch.Tensor | None,
) -> Any:
    """The mask of one span for the attention implementation in use, as transformers makes it; None: it needs none.

    ``slot_idx`` is a cache slot of that span. ValueError where the implementation cannot keep sinks visible.
    """
    window, sinks = span
    implementation = config._attn_implementation or "eager"
    if sinks and ("flash" in implementation or implementation not in ALL_MASK_ATTENTION_FUNCTIONS):
        raise ValueError(f"{implementation} cannot keep first tokens visible; use sdpa, eager or flex_attention")
    given: dict[str, Any] = {
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "layer_idx": slot_idx,
    }
    if window is None:
        return create_causal_mask(config=config, **given)
    begin = _begin(hidden, attention_mask)
    slots = past_key_values.layers if isinstance(past_key_values, Cache) else []
    if slot_idx < len(slots) and hasattr(slots[slot_idx], "first_tokens"):
        return _mask_over_gap(span, slots[slot_idx], hidden, config, attention_mask, begin)
    if sinks:
        given["or_mask_function"] = lambda b, _, query, key: (key <= query) & (key < begin[b] + sinks)
    seen_as: Any = LayerConfig(config, {"sliding_window": window})
    return create_sliding_window_causal_mask(config=seen_as, **given)


def note_padding(past_key_values: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Tells the slots of ``past_key_values`` how much padding lies before the sinks that they must keep.

    Only until tokens are dropped: what is padding so far is kept, and once every row has begun nothing changes.
    """
    if attention_mask is None or attention_mask.ndim != 2 or not isinstance(past_key_values, Cache):
        return
    slots = [slot for slot in past_key_values.layers if isinstance(slot, SpanSlot) and slot.sinks and not slot.gap]
    if slots:
        padding = int(_begin(hidden, attention_mask).max())
        for slot in slots:
            slot.first_tokens = slot.sinks + padding


def _begin(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:  # (B,)
    """Where each sequence begins, after any padding on the left."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return (attention_mask.to(hidden.device).cumsum(-1) == 0).sum(-1)


def _mask_over_gap(
    span: Span,
    slot: Any,
    hidden: torch.Tensor,
    config: PuzzleConfig,
    attention_mask: torch.Tensor | None,
    begin: torch.Tensor,
) -> Any:
    """The mask over what a slot holds that may have dropped tokens in the middle, where ``first_tokens`` end."""
    window, sinks = span
    assert window is not None
    if attention_mask is not None and attention_mask.ndim == 4:  # made elsewhere, to be used as it is
        return attention_mask
    num_tokens, num_seen = hidden.shape[1], slot.get_seq_length()
    num_keys = slot.get_mask_sizes(num_tokens)[0]
    first, gap = slot.first_tokens, num_seen + num_tokens - num_keys
    real = None if attention_mask is None else attention_mask.to(hidden.device, torch.bool)

    def visible(batch: torch.Tensor, _: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        position = torch.where(key < first, key, key + gap)
        seen = (position <= query) & ((position > query - window) | (position < begin[batch] + sinks))
        return seen if real is None else seen & real[batch, position]

    implementation = config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None  # a kernel that is told the window, and has no sinks
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=hidden.shape[0],
        q_length=num_tokens,
        kv_length=num_keys,
        q_offset=num_seen,
        kv_offset=0,
        mask_function=visible,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=hidden.dtype,
        config=config,
        device=hidden.device,
    )
