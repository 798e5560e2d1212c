"""Bytes on one GPU: weights, KV cache and workspace. Computed from shapes alone; reads and writes nothing.

memory = sum over sites (weights + KV cache) + rest weights + workspace, the sum that ``memory_gib`` bounds.
"""

from __future__ import annotations

import math
from dataclasses import replace

from puzzle import formats, variants
from puzzle.types import AttentionSpec, ModelShape, Spec, Workload

LOGIT_BYTES = 4.0  # logits are cast to fp32 before sampling
# tokens of all prompts that one forward takes by default (max_num_batched_tokens, chunked_prefill_size, max_num_tokens)
CHUNK_TOKENS = {"vllm": 8192, "sglang": 8192, "tensorrt-llm": 8192}


def weight_bytes(spec: Spec, shape: ModelShape, dtype: str, tp: int = 1) -> float:
    """Bytes of the site's weights on one of ``tp`` GPUs: heads, channels, experts are shared out, each of them whole.

    Norms and ``linear`` are counted in full on every GPU; an expert's row of the router goes with the expert. The
    scales of quantised weights count, and what is not quantised (formats.py) has 16 bits.
    """
    local, local_shape, stored = spec_per_gpu(spec, tp), shape_per_gpu(shape, tp), spec.precision or dtype
    quantised = math.fsum(
        matrix.count * formats.matrix_bytes(matrix.fan_in, matrix.fan_out, stored)
        for matrix in variants.matrices(local, local_shape)
    )
    return quantised + formats.unquantised_bytes(variants.others(local, local_shape), stored)


def rest_weight_bytes(shape: ModelShape, dtype: str, tp: int = 1) -> float:
    """Bytes of embedding, head and final norm on one of ``tp`` GPUs; a tied embedding is counted once."""
    return formats.unquantised_bytes(variants.rest_params(shape_per_gpu(shape, tp)), dtype)


def kv_cache_bytes(spec: Spec, shape: ModelShape, workload: Workload, batch_size: int) -> float:
    """Bytes of K and V of all ``batch_size`` sequences on one GPU when the last of isl + osl tokens has been made.

    Attention with a window needs no more than the window, and its sinks.
    """
    per_token = variants.kv_bytes_per_token(spec, shape, workload.kv, workload.tp)
    return per_token * variants.tokens_in_sight(spec, workload.context_tokens) * batch_size


def workspace_bytes(shape: ModelShape, workload: Workload, batch_size: int) -> float:
    """Bytes that a forward needs besides weights and KV cache on one GPU; the same for all variants but fused FFNs.

    The widest moment of a prefill, per prompt token, in the weights' dtype (16 bits where they are
    quantised), with the teacher's sizes::

        4 hidden + rotary table + max(attention: q, its three rotary temporaries, k, v; FFN: act(gate), up, product)

    where the four are the layer's input, the last block's output, their sum and its norm; plus fp32 logits of one token
    per sequence. A layer with experts has, in place of the FFN, for each expert that a token goes to, the token's
    normed input and the expert's act(gate), up, product. Runtimes that cut prompts into chunks hold one chunk's.
    """
    local = shape_per_gpu(shape, workload.tp)
    attention = (4 * local.num_attention_heads + 2 * local.num_kv_heads) * local.head_dim
    ffn = 3 * local.intermediate_size if len(shape.moe_layers) < shape.num_layers else 0
    per_expert = local.hidden_size + 3 * shape.moe_intermediate_size
    experts = _share(shape.num_active_experts, workload.tp) * per_expert if shape.moe_layers else 0
    widest = 4 * local.hidden_size + 2 * shape.head_dim + max(attention, ffn, experts)
    tokens = min(batch_size * workload.isl, CHUNK_TOKENS.get(workload.runtime, batch_size * workload.isl))
    activations = tokens * widest * formats.activation_bytes(workload.weights)
    return activations + batch_size * shape.vocab_size * LOGIT_BYTES


def added_workspace_bytes(spec: Spec, shape: ModelShape, workload: Workload, batch_size: int) -> float:
    """What a forward needs on top where ``spec`` is an FFN wider than the teacher's: a fused one.

    Sums over sites count it once for each such FFN, though a forward needs it once: an upper bound.
    """
    if isinstance(spec, AttentionSpec) or (spec.intermediate_size or 0) <= shape.intermediate_size:
        return 0.0
    wider = replace(shape, intermediate_size=spec.intermediate_size or 0)
    return workspace_bytes(wider, workload, batch_size) - workspace_bytes(shape, workload, batch_size)


def shape_per_gpu(shape: ModelShape, tp: int) -> ModelShape:
    """What one of ``tp`` GPUs holds of the model: heads, channels and vocabulary shared out, rounded up."""
    return replace(
        shape,
        num_attention_heads=_share(shape.num_attention_heads, tp),
        num_kv_heads=_share(shape.num_kv_heads, tp),
        intermediate_size=_share(shape.intermediate_size, tp),
        vocab_size=_share(shape.vocab_size, tp),
    )


def spec_per_gpu(spec: Spec, tp: int) -> Spec:
    """What one of ``tp`` GPUs holds of a site, to be read with :func:`shape_per_gpu`; experts are never split."""
    if isinstance(spec, AttentionSpec):
        return replace(spec, num_kv_heads=_share(spec.num_kv_heads, tp)) if spec.num_kv_heads else spec
    if spec.intermediate_size:
        return replace(spec, intermediate_size=_share(spec.intermediate_size, tp), num_fused=None)
    return replace(spec, num_experts=_share(spec.num_experts, tp)) if spec.num_experts else spec


def _share(count: int, tp: int) -> int:
    return math.ceil(count / tp)
