"""Predicted bytes against the tensors that built models and their caches really hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from puzzle.modeling import PuzzleConfig
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.memory import kv_cache_bytes, rest_weight_bytes, weight_bytes, workspace_bytes
from puzzle.profiling.stack import Dtype, ForwardStep, random_model
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, ModelShape, Spec, Workload
from puzzle.variants import block_part, keep_spec

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
    fused, plain = FfnSpec("narrow", 3 * 20, num_fused=3), FfnSpec("narrow", 3 * 20)  # 8 channels a GPU, not by three
    assert weight_bytes(fused, shape, "bf16", 8) == weight_bytes(plain, shape, "bf16", 8)
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
        return (whole - changed.vocab_size * 4) / 2 - 4 * changed.hidden_size - 2 * changed.head_dim

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
    assert workspace(10) == 3 * 10 * (4 * 24 + 2 * 8 + attention) * 2 + logits
    assert workspace(10, "fp32") - logits == 2 * (workspace(10) - logits)
    wide = replace(shape, intermediate_size=400)
    assert workspace_bytes(wide, Workload("w", isl=10, osl=7), 3) == 3 * 10 * (4 * 24 + 2 * 8 + 1200) * 2 + logits
    assert workspace(10, tp=2) == 3 * 10 * (4 * 24 + 2 * 8 + attention / 2) * 2 + logits


def test_runtimes_that_cut_prompts_hold_one_chunk_at_a_time(shape: ModelShape) -> None:
    def activations(runtime: str, batch_size: int) -> float:
        found = workspace_bytes(shape, Workload("w", isl=4096, osl=1, runtime=runtime), batch_size)
        return found - batch_size * shape.vocab_size * 4

    assert activations("vllm", 1) == activations("transformers", 1)
    assert activations("vllm", 2) == activations("transformers", 2) == activations("vllm", 64)
    assert activations("transformers", 64) == 64 * activations("transformers", 1)


def test_unknown_dtypes(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'fp7'"):
        weight_bytes(KEEP_FFN, shape, "fp7")


def test_scales_of_quantised_weights_are_counted_and_what_is_not_quantised_has_16_bits(shape: ModelShape) -> None:
    hidden, width = shape.hidden_size, 16  # 24 hidden, groups of 32: one scale a row of gate and up, and of down
    narrow = FfnSpec("narrow", intermediate_size=width)
    matrices, norm = 3 * hidden * width, hidden
    rows = 2 * width + hidden
    assert weight_bytes(narrow, shape, "fp8") == matrices + 4 * rows + 2 * norm
    assert weight_bytes(narrow, shape, "int4-g32") == matrices / 2 + 2 * rows + 2 * norm
    large = replace(shape, hidden_size=4096, intermediate_size=14336)
    assert weight_bytes(KEEP_FFN, large, "int4-g128") == pytest.approx(3 * 4096 * 14336 * (0.5 + 2 / 128), rel=1e-3)
    assert rest_weight_bytes(shape, "fp8") == rest_weight_bytes(shape, "bf16")
    moe = replace(shape, moe_layers=(0,), num_experts=8, num_active_experts=2, moe_intermediate_size=16)
    experts = FfnSpec("experts", num_experts=4, num_active_experts=2)
    assert weight_bytes(experts, moe, "fp8") == 4 * (matrices + 4 * rows + 2 * hidden) + 2 * norm  # router in 16 bits


@pytest.mark.parametrize(
    ("name", "shape", "kv_bytes_per_token", "wrong"),
    [
        # heads * head_dim is not the hidden size: hidden / heads is no head size (or no whole number)
        (
            "Mistral-Small-24B",
            ModelShape("mistral", 40, 5120, 32, 8, 128, 32768, 131072, 32768, tied_embeddings=False),
            2 * 40 * 8 * 128 * 2,
            2 * 40 * 8 * (5120 // 32) * 2,
        ),
        (
            "Qwen3-32B",
            ModelShape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960, tied_embeddings=False, qk_norm=True),
            2 * 64 * 8 * 128 * 2,
            2 * 64 * 8 * (5120 // 64) * 2,
        ),
        (
            "Llama-3.2-3B",
            ModelShape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, tied_embeddings=True),
            2 * 28 * 8 * 128 * 2,
            28 * 8 * 128 * 2,
        ),
    ],
)
def test_kv_cache_of_shapes_that_others_get_wrong(
    name: str, shape: ModelShape, kv_bytes_per_token: int, wrong: int
) -> None:
    """Per token, in bf16: K and V of every layer, num_kv_heads * head_dim wide; ``wrong``: by hidden / heads, or K."""
    workload = Workload("w", isl=1, osl=1)
    found = sum(kv_cache_bytes(keep_spec(shape, site), shape, workload, 1) for site in shape.sites) / 2
    assert found == kv_bytes_per_token != wrong


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (ModelShape("mistral", 40, 5120, 32, 8, 128, 32768, 131072, 32768, tied_embeddings=False), 23_572_403_200),
        (
            ModelShape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960, tied_embeddings=False, qk_norm=True),
            32_762_123_264,
        ),
        (ModelShape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, tied_embeddings=True), 3_212_749_824),
        (ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False), 8_030_261_248),
    ],
)
def test_parameters_are_the_published_ones(shape: ModelShape, published: int) -> None:
    total = sum(weight_bytes(keep_spec(shape, site), shape, "bf16") for site in shape.sites)
    assert (total + rest_weight_bytes(shape, "bf16")) / 2 == published


class _Peak(TorchDispatchMode):
    """The most bytes of new tensors that are alive at once."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._alive = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]:
            if storage._cdata not in self._bytes:
                self._bytes[storage._cdata] = storage.nbytes()
                self._alive += storage.nbytes()
                self.bytes = max(self.bytes, self._alive)
                weakref.finalize(storage, self._gone, storage._cdata)
        return output

    def _gone(self, key: int) -> None:
        self._alive -= self._bytes.pop(key)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("hidden", "width", "heads", "kv_heads", "head_dim", "batch_size", "isl"),
    [(256, 1024, 8, 2, 32, 4, 128), (256, 256, 8, 8, 64, 2, 256), (512, 2048, 8, 4, 64, 1, 512)],
)
def test_workspace_is_what_a_prefill_takes(
    make_config: MakeConfig,
    dtype: Dtype,
    hidden: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch_size: int,
    isl: int,
) -> None:
    shape = ModelShape("llama", 3, hidden, heads, kv_heads, head_dim, width, 96, 2048, tied_embeddings=False)
    keep = {"attention": {"kind": "keep"}, "ffn": {"kind": "keep"}}
    model = random_model(make_config(shape), [keep] * 3, "cpu", dtype)
    step = ForwardStep(model, GridPoint("prefill", batch_size, isl))
    cached = [tensor for slot in step.cache.slots for tensor in (slot.keys, slot.values)]
    with _Peak([*model.parameters(), *model.buffers(), *cached]) as peak:
        step()
    predicted = workspace_bytes(shape, Workload("w", isl, 2, weights=dtype, kv=dtype), batch_size)
    assert 0.95 * predicted < peak.bytes <= 1.01 * predicted  # token ids and the like are not counted
