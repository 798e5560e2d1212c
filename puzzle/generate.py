"""Text from a model: prompts go on token by token, each with random numbers of its own.

Reads a model, prompts and numbers; computes what each prompt is continued with, through the model's KV cache, shorter
prompts padded on the left. A row's numbers are given, so what comes of it does not depend on the rows beside it, but
for rounding. Sampling is by inverse distribution: tokens by falling probability, of which those count that make up
``top_p`` (Holtzman et al., 1904.09751).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.modeling import PuzzleForCausalLM


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0


@torch.no_grad()
def continuations(
    model: PuzzleForCausalLM,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    sampling: Sampling,
    ends: Collection[int],
) -> list[list[int]]:
    """Up to T new tokens for each prompt (at least one token long), one of ``ends`` the last, if it came to that.

    ``numbers`` (B, T) fp64 in [0, 1): one for each token that may be drawn.
    """
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=model.device)  # (B, width), then (B, 1)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    seen = torch.arange(width, device=model.device) >= (width - lengths)[:, None]  # (B, tokens so far)
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    cache, numbers = model.model.new_cache(), numbers.to(model.device)
    found: list[list[int]] = [[] for _ in prompts]
    for step in range(numbers.shape[1]):
        logits = model(
            ids, attention_mask=seen.long(), position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        drawn = draw(logits, numbers[:, step], sampling)
        going = False
        for of_row, token in zip(found, drawn.tolist(), strict=True):
            if not of_row or of_row[-1] not in ends:
                of_row.append(token)
                going |= token not in ends
        if not going:
            break
        ids, positions = drawn[:, None], positions[:, -1:] + 1
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    return found


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """(B,) tokens from logits (B, V) by ``numbers`` (B,) in [0, 1)."""
    if not sampling.temperature:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    up_to = falling.cumsum(-1)
    counted = torch.where(up_to - falling < sampling.top_p, falling, 0.0).cumsum(-1)  # the likeliest always counts
    place = torch.searchsorted(counted, (numbers * counted[:, -1])[:, None], right=True)
    return order.gather(1, place.clamp_max(logits.shape[-1] - 1))[:, 0]
