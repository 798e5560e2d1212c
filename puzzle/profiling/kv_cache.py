"""A KV cache whose memory is there before the forward: prefill fills it, a decode step writes its token in place.

Every forward starts from the same number of cached tokens, so the same step can be repeated (and captured as a CUDA
graph) as often as it must be timed. Only real attention has a slot; slots are numbered as in PuzzleConfig.cache_idx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.profiling.grid import GridPoint


class PreallocatedLayer(DynamicLayer):
    """K and V of one attention: (B, Hkv, cached + new tokens, head_dim), the first ``cached_tokens`` of them fixed."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, cached_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.cached_tokens = cached_tokens
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new tokens (B, Hkv, T, head_dim) behind the cached ones; gives all, cached and new."""
        end = self.cached_tokens + key_states.shape[2]
        self.keys[:, :, self.cached_tokens : end].copy_(key_states)
        self.values[:, :, self.cached_tokens : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens seen before this forward: what transformers takes positions and masks from."""
        return self.cached_tokens


class PreallocatedCache(Cache):
    """One slot per real attention, with ``kv_heads[slot]`` heads; the cached tokens are random numbers."""

    def __init__(
        self, kv_heads: Sequence[int], head_dim: int, point: GridPoint, like: torch.Tensor, seed: int = 0
    ) -> None:
        generator = torch.Generator(device=like.device).manual_seed(seed)

        def tokens(heads: int) -> torch.Tensor:
            size = (point.batch_size, heads, point.total_tokens, head_dim)
            return torch.empty(size, dtype=like.dtype, device=like.device).normal_(generator=generator)

        self.slots = [PreallocatedLayer(tokens(heads), tokens(heads), point.cached_tokens) for heads in kv_heads]
        super().__init__(layers=list(self.slots))

    @property
    def num_bytes(self) -> int:
        """What K and V of all slots take."""
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.slots)
