"""Starting points of variants: the paper's, and the closed-form refit of their last matrix.

The paper's (Puzzle, section 2): keep the FFN channels that contribute most; mean-pool the K and V heads of a merged
group; a linear attention is ``W_O W_V`` (each token attends to itself), a linear FFN ``W_down W_up``. The closed form
starts there and solves for the last matrix W (output or down projection, or the linear map itself) by least squares
on calibration tokens, shrunk towards the teacher's own columns P (zero for linear maps):

    W = argmin  Σ_tokens |W z − y|² + λ Σ_j (ZᵀZ)_jj |W_j − P_j|²     z: the variant's features, y: the teacher's output

(compare ReplaceMe; Kwon et al. 2022). λ is scaled per feature, so outlier channels do not set it for all. Moments are
summed, and the system solved, in fp64 on the CPU; the first position of each sequence is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puzzle.blocks.layer import captured_inputs, output_projection, part_state, variant_layer
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle.teacher import LayerPass
from puzzle.types import Part, Spec

RIDGE = 1e-3


def paper_start(layer: PuzzleDecoderLayer, part: Part, spec: Spec, channels: Tensor) -> dict[str, Tensor]:
    """Weights of ``spec`` from the teacher's ``layer``; ``channels`` (I,) is the importance of its FFN channels."""
    state = {name: tensor.clone() for name, tensor in part_state(layer, part).items()}
    if spec.kind == "gqa":
        return _pool_kv_heads(layer, state, spec.num_kv_heads or 0)
    if spec.kind == "narrow":
        kept = channels.topk(spec.intermediate_size or 0).indices.sort().values
        return {name: _keep_channels(name, tensor, kept) for name, tensor in state.items()}
    if spec.kind == "linear":
        return _linear(layer, part, state)
    if spec.kind == "skip":
        return {}
    assert spec.kind == "keep"
    return state


def closed_form_start(
    layer: PuzzleDecoderLayer, part: Part, spec: Spec, start: Mapping[str, Tensor], passes: list[LayerPass]
) -> dict[str, Tensor]:
    """``start`` with its last matrix refitted to what the teacher's site adds on ``passes``."""
    if spec.kind in ("keep", "skip"):
        return dict(start)
    variant = variant_layer(layer, part, spec, start)
    projection = output_projection(variant, part)
    bias = projection.bias
    gram, cross = _moments(variant, layer, part, passes)
    target = cross if bias is None else cross - _feature_sum(variant, part, passes)[:, None] * bias.cpu().double()
    prior = torch.zeros_like(target) if spec.kind == "linear" else projection.weight.cpu().double().T
    ridge = RIDGE * gram.diagonal().clamp_min(gram.diagonal().mean() * 1e-6)
    fitted = torch.linalg.solve(gram + ridge.diag(), target + ridge[:, None] * prior).T  # (D, F)
    name = next(name for name, tensor in variant.named_parameters() if tensor is projection.weight)
    return {**start, name: fitted.float().contiguous().to(projection.weight.device)}


@torch.no_grad()
def _moments(
    variant: PuzzleDecoderLayer, teacher: PuzzleDecoderLayer, part: Part, passes: list[LayerPass]
) -> tuple[Tensor, Tensor]:
    """ZᵀZ (F, F) and ZᵀY (F, D) in fp64: Z the inputs of the variant's last matrix, Y what the teacher's site adds."""
    size = output_projection(variant, part).in_features
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, output_projection(teacher, part).out_features, dtype=torch.float64)
    for one in passes:
        features = _features(variant, part, one)
        change = one.middle - one.before if part == "attention" else one.after - one.middle
        outputs = change[:, 1:].flatten(0, 1)  # (N, D)
        gram += (features.T @ features).cpu().double()
        cross += (features.T @ outputs).cpu().double()
    return gram, cross


@torch.no_grad()
def _feature_sum(variant: PuzzleDecoderLayer, part: Part, passes: list[LayerPass]) -> Tensor:
    return torch.stack([_features(variant, part, one).cpu().double().sum(0) for one in passes]).sum(0)


def _features(variant: PuzzleDecoderLayer, part: Part, one: LayerPass) -> Tensor:
    """(N, F): what the last matrix of the variant sees."""
    with captured_inputs(output_projection(variant, part)) as seen:
        variant.attention_delta(one.before, one.position) if part == "attention" else variant.ffn_delta(one.middle)
    return seen[0][:, 1:].flatten(0, 1)


def _pool_kv_heads(layer: PuzzleDecoderLayer, state: dict[str, Tensor], num_kv_heads: int) -> dict[str, Tensor]:
    attention: Any = layer.self_attn
    head_dim = attention.head_dim
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = tensor.view(num_kv_heads, -1, head_dim, *tensor.shape[1:])  # (K, merged, head_dim, ...)
            state[name] = heads.mean(1).reshape(num_kv_heads * head_dim, *tensor.shape[1:])
    return state


def _keep_channels(name: str, tensor: Tensor, kept: Tensor) -> Tensor:
    if ".gate_proj." in name or ".up_proj." in name:
        return tensor[kept].contiguous()
    return tensor[:, kept].contiguous() if name.endswith(".down_proj.weight") else tensor


def _linear(layer: PuzzleDecoderLayer, part: Part, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if part == "ffn":
        mlp: Any = layer.mlp
        product = mlp.down_proj.weight @ mlp.up_proj.weight
        norm = "post_attention_layernorm.weight"
        return {norm: state[norm], "mlp.linear_mlp.weight": product.detach().clone()}
    attention: Any = layer.self_attn
    values = attention.v_proj.weight.view(-1, attention.head_dim, attention.v_proj.in_features)  # (K, head_dim, D)
    per_head = values.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)  # (heads * head_dim, D)
    product = attention.o_proj.weight @ per_head
    norm = "input_layernorm.weight"
    return {norm: state[norm], "self_attn.linear_attn.weight": product.detach().clone()}
