"""Importance of FFN channels and layers, forward only, from calibration tokens.

Channel (Puzzle): ``C_i = mean over tokens |X_i| * ||W_down[:, i]||_2`` with X the gated activation. Layer (Minitron's
Block Importance): ``1 - E[cos(X_l, X_{l+1})]``. The first position of each sequence is left out everywhere: its massive
activations are an artefact that would drown the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocks.layer import captured_inputs, output_projection
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass


@dataclass(frozen=True)
class LayerImportance:
    """``ffn_channels``: (I,) contribution of each channel; ``block``: Block Importance of the layer."""

    ffn_channels: Tensor
    block: float


@torch.no_grad()
def layer_importance(layer: PuzzleDecoderLayer, passes: list[LayerPass]) -> LayerImportance:
    down = output_projection(layer, "ffn")
    activity = torch.zeros(down.in_features, dtype=torch.float64)
    distances, num_tokens = 0.0, 0
    for one in passes:
        with captured_inputs(down) as seen:
            layer.ffn_delta(one.middle)
        activations = seen[0][:, 1:].flatten(0, 1)  # (N, I)
        activity += activations.abs().sum(0).cpu().double()
        cosine = F.cosine_similarity(one.before[:, 1:].float(), one.after[:, 1:].float(), dim=-1)
        distances += (1 - cosine).sum().item()
        num_tokens += len(activations)
    contribution = activity / num_tokens * down.weight.cpu().double().norm(dim=0)
    return LayerImportance(contribution.float(), distances / num_tokens)
