"""Predicted bytes against the tensors that built models and their caches really hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from puzzle.modeling import PuzzleConfig
from puzzle.profiling.memory import kv_cache_bytes, rest_weight_bytes, to_gib, weight_bytes, workspace_bytes
from puzzle.profiling.stack import random_model
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, ModelShape, Spec, Workload
from puzzle.variants import block_part

MakeConfig = Callable[[ModelShape], PuzzleConfig]
KEEP_ATTENTION, KEEP_FFN = AttentionSpec("keep"), FfnSpec("keep")
MIX: list[tuple[AttentionSpec, FfnSpec]] = [
    (AttentionSpec("gqa", num_kv_heads=2), FfnSpec("narrow", intermediate_size=16)),
    (AttentionSpec("skip"), KEEP_FFN),
    (AttentionSpec("gqa", num_kv_heads=1), FfnSpec("linear")),
    (AttentionSpec("linear"), FfnSpec("skip")),
    (KEEP_ATTENTION, KEEP_FFN),
]
SPECS: list[Spec] = [spec for layer in MIX for spec in layer]
BLOCKS = [{"attention": block_part(attention), "ffn": block_part(ffn)} for attention, ffn in MIX]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_bytes_are_those_of_a_built_model(
    shape: ModelShape, make_config: MakeConfig, dtype: str, tied: bool, bias: bool
) -> None:
    shape = replace(shape, tied_embeddings=tied, qkv_bias=bias, output_bias=bias, mlp_bias=bias)
    model = random_model(make_config(shape), BLOCKS, "cpu", dtype, layers=[0] * 5)  # type: ignore[arg-type]
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(weight_bytes(spec, shape, dtype) for spec in SPECS) + rest_weight_bytes(shape, dtype) == held


def test_kv_cache_bytes_are_those_of_the_cache_after_generation(
    shape: ModelShape, teacher_config: PuzzleConfig
) -> None:
    model = random_model(teacher_config, BLOCKS, "cpu", "bf16", layers=[0] * 5)
    workload = Workload("w", isl=9, osl=5)
    ids = torch.randint(3, shape.vocab_size, (2, workload.isl))
    cache = DynamicCache()
    # one more token than osl, because generate does not feed its last token back
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        past_key_values=cache,
    )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sum(kv_cache_bytes(spec, shape, workload, 2) for spec in SPECS) == held > 0


def test_kv_heads_are_never_split_over_gpus(shape: ModelShape) -> None:
    one, two, eight = (Workload("w", isl=10, osl=6, tp=tp) for tp in (1, 2, 8))
    of_one_head = 2 * shape.head_dim * 2 * 16 * 3  # K and V, bf16, isl + osl, 3 sequences
    assert kv_cache_bytes(KEEP_ATTENTION, shape, one, 3) == 4 * of_one_head
    assert kv_cache_bytes(KEEP_ATTENTION, shape, two, 3) == 2 * of_one_head
    assert kv_cache_bytes(KEEP_ATTENTION, shape, eight, 3) == of_one_head
    assert kv_cache_bytes(AttentionSpec("linear"), shape, one, 3) == 0 == kv_cache_bytes(KEEP_FFN, shape, one, 3)


def test_weights_are_shared_out_over_gpus(shape: ModelShape) -> None:
    norm = shape.hidden_size * 2
    whole, half = (weight_bytes(FfnSpec("narrow", intermediate_size=16), shape, "bf16", tp) for tp in (1, 2))
    assert half - norm == (whole - norm) / 2
    one_head = AttentionSpec("gqa", num_kv_heads=1)
    # queries and output are halved, the one KV head is on both
    query, kv = shape.hidden_size * shape.num_attention_heads * shape.head_dim, shape.hidden_size * shape.head_dim
    assert weight_bytes(one_head, shape, "bf16", 2) == 2 * (query / 2 * 2 + 2 * kv) + norm
    assert rest_weight_bytes(shape, "bf16", 2) == 2 * shape.vocab_size * shape.hidden_size + norm


def test_a_window_bounds_the_cache(shape: ModelShape) -> None:
    """The token under way counts: 2 in the window, or with a sink 3, of 16 in all."""
    workload = Workload("w", isl=10, osl=6)
    per_token = 2 * 4 * shape.head_dim * 2 * 3
    assert kv_cache_bytes(AttentionSpec("window", window_tokens=2), shape, workload, 3) == 2 * per_token
    assert kv_cache_bytes(AttentionSpec("window", window_tokens=2, sink_tokens=1), shape, workload, 3) == 3 * per_token
    assert kv_cache_bytes(AttentionSpec("window", window_tokens=99), shape, workload, 3) == 16 * per_token
    assert kv_cache_bytes(AttentionSpec("keep", window_tokens=5), shape, workload, 3) == 5 * per_token


def test_experts_are_shared_out_over_gpus_as_they_are(shape: ModelShape) -> None:
    moe = replace(shape, moe_layers=(0, 2), num_experts=6, num_active_experts=2, moe_intermediate_size=12)
    keep = FfnSpec("keep", num_experts=6, num_active_experts=2)
    expert, norm = 3 * shape.hidden_size * 12 + shape.hidden_size, shape.hidden_size  # with its row of the router
    held = {tp: (weight_bytes(keep, moe, "bf16", tp) / 2 - norm) / expert for tp in (1, 2, 4, 8)}
    assert held == {1: 6, 2: 3, 4: 2, 8: 1}
    assert weight_bytes(FfnSpec("keep"), moe, "bf16") == weight_bytes(KEEP_FFN, shape, "bf16")  # a dense layer of it

    def workspace(changed: ModelShape, tp: int = 1) -> float:
        whole = workspace_bytes(changed, Workload("w", isl=1, osl=1, tp=tp), 1)
        return (whole - changed.vocab_size * 4) / 2 - 2 * changed.hidden_size

    wide = replace(moe, moe_intermediate_size=100)
    assert workspace(wide) == 2 * (shape.hidden_size + 300) == 2 * workspace(wide, tp=2)
    only_experts = replace(moe, intermediate_size=10**6, moe_layers=(0, 1, 2))
    assert workspace(only_experts) == workspace(shape) < workspace(replace(only_experts, moe_layers=(0, 1)))


def test_workspace_grows_with_the_prompt_and_counts_logits_in_fp32(shape: ModelShape) -> None:
    def workspace(isl: int, weights: str = "bf16", tp: int = 1) -> float:
        return workspace_bytes(shape, Workload("w", isl=isl, osl=7, weights=weights, tp=tp), 3)

    attention, ffn = (4 * 4 + 2 * 4) * 8, 3 * 40
    assert attention > ffn
    logits = 3 * shape.vocab_size * 4
    assert workspace(10) == 3 * 10 * (2 * 24 + attention) * 2 + logits
    assert workspace(10, "fp32") - logits == 2 * (workspace(10) - logits)
    wide = replace(shape, intermediate_size=400)
    assert workspace_bytes(wide, Workload("w", isl=10, osl=7), 3) == 3 * 10 * (2 * 24 + 1200) * 2 + logits
    assert workspace(10, tp=2) == 3 * 10 * (2 * 24 + attention / 2) * 2 + logits


def test_gib_and_unknown_dtypes(shape: ModelShape) -> None:
    assert to_gib(3 * 2**30) == 3.0
    with pytest.raises(ConfigError, match="unknown dtype 'fp7'"):
        weight_bytes(KEEP_FFN, shape, "fp7")
