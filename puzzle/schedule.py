"""What block-wise and global distillation share: AdamW's settings, the number of steps, the learning rate over them."""

from __future__ import annotations

import math

CLIP_NORM = 1.0
BETAS = (0.9, 0.95)


def num_steps(tokens: int, batch_size: int, sequence_tokens: int) -> int:
    """Steps of ``batch_size`` sequences that see at least ``tokens`` tokens."""
    return math.ceil(tokens / (batch_size * sequence_tokens))


def warmup_cosine(step: int, steps: int, warmup_steps: int, floor: float = 0.0) -> float:
    """The share of the peak rate at ``step``: linear warm-up, then cosine decay to ``floor``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
