"""A KV cache whose memory is there before the forward: prefill fills it, a decode step writes its token in place.

Every forward starts from the same number of cached tokens, so the same step can be repeated (and captured as a CUDA
graph) as often as it must be timed. Only real attention has a slot; slots are numbered as in PuzzleConfig.cache_idx.
A slot holds what the model's own cache (PuzzleModel.new_cache) does: of a window, the tokens in sight only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.profiling.grid import GridPoint


@dataclass(frozen=True)
class Slot:
    """The K and V that one attention caches: its heads, how far back it looks (None: over everything), its sinks."""

    num_kv_heads: int
    window_tokens: int | None = None
    sink_tokens: int = 0

    def held_tokens(self, cached_tokens: int) -> int:
        """Of ``cached_tokens`` seen, those that the next token looks at."""
        if self.window_tokens is None:
            return cached_tokens
        return min(cached_tokens, self.window_tokens - 1 + self.sink_tokens)


class PreallocatedLayer(DynamicLayer):
    """K and V of one attention: (B, Hkv, held + new tokens, head_dim), the first ``held_tokens`` of them fixed.

    They are the last of the ``cached_tokens`` that the sequence has had, behind its ``first_tokens`` if that is set:
    then masks are made as for a SpanSlot.
    """

    first_tokens: int

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, cached_tokens: int, held_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.cached_tokens = cached_tokens
        self.held_tokens = held_tokens
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new tokens (B, Hkv, T, head_dim) behind those held; gives all, held and new."""
        end = self.held_tokens + key_states.shape[2]
        self.keys[:, :, self.held_tokens : end].copy_(key_states)
        self.values[:, :, self.held_tokens : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens seen before this forward: what transformers takes positions and masks from."""
        return self.cached_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens a forward attends to, and which of the sequence the first of them is."""
        return self.held_tokens + query_length, self.cached_tokens - self.held_tokens


class PreallocatedCache(Cache):
    """One layer per slot; the held tokens are random numbers."""

    def __init__(
        self, slots: Sequence[Slot], head_dim: int, point: GridPoint, like: torch.Tensor, seed: int = 0
    ) -> None:
        generator = torch.Generator(device=like.device).manual_seed(seed)

        def tokens(slot: Slot, held: int) -> torch.Tensor:
            size = (point.batch_size, slot.num_kv_heads, held + point.new_tokens, head_dim)
            return torch.empty(size, dtype=like.dtype, device=like.device).normal_(generator=generator)

        self.slots = []
        for slot in slots:
            held = slot.held_tokens(point.cached_tokens)
            keys, values = tokens(slot, held), tokens(slot, held)
            self.slots.append(PreallocatedLayer(keys, values, point.cached_tokens, held))
            if slot.sink_tokens:
                self.slots[-1].first_tokens = slot.sink_tokens
        super().__init__(layers=list(self.slots))

    @property
    def num_bytes(self) -> int:
        """What K and V of all slots take."""
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.slots)
