"""Several FFNs that get the same input, as a single one (FFN Fusion, arXiv 2503.18908). Exact; computes tensors only.

    sum_j W_down,j (act(W_gate,j G_j h) * W_up,j G_j h) = W_down (act(W_gate h) * W_up h),   h = x / rms(x)

Gate and up are the FFNs' own stacked, each with its norm's gain G_j folded in, down is theirs side by side, and the
norm of the fused FFN has a gain of ones: no gain is divided by, so zeros do no harm. There must be no norm after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def fuse(ffns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The FFN that computes the sum of ``ffns``, in fp32 (or what is finer) on the CPU; names within a layer.

    Of each, its norm's gain (D,), ``gate_proj`` and ``up_proj`` (I, D), ``down_proj`` (D, I), and biases if any.
    """
    parts = [
        {name: tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in ffn.items()}
        for ffn in ffns
    ]
    (norm,) = (name for name in parts[0] if not name.startswith("mlp."))
    fused = {norm: torch.ones_like(parts[0][norm])}
    for name in parts[0].keys() - {norm}:
        each = [part[name] for part in parts]
        if name.startswith("mlp.down_proj"):
            fused[name] = torch.cat(each, 1) if name.endswith("weight") else torch.stack(each).sum(0)
        else:
            gains = [part[norm] if name.endswith("weight") else torch.ones(()) for part in parts]
            fused[name] = torch.cat([tensor * gain for tensor, gain in zip(each, gains, strict=True)])
    return fused
