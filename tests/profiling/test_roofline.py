"""The roofline against figures worked out by hand, and the orders that any estimate must keep."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import HARDWARE, Deployment, hardware
from puzzle.profiling.kernels import Kernel, rest_kernels, site_kernels
from puzzle.profiling.memory import kv_cache_bytes, rest_weight_bytes, weight_bytes
from puzzle.profiling.roofline import Efficiency, estimate, kernel_ms
from puzzle.profiling.table import ANY_ENGINE, REST, CostTable
from puzzle.types import AttentionSpec, ConfigError, Costs, FfnSpec, ModelShape, Spec, Workload
from puzzle.variants import flops_per_token, keep_spec, resolve, shape_id

LLAMA_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tied_embeddings=False)
QWEN_MOE = ModelShape(
    "qwen3_moe",
    *(2, 2048, 32, 4, 128, 6144, 151936, 40960),
    tied_embeddings=False,
    qk_norm=True,
    moe_layers=(1,),
    num_experts=128,
    num_active_experts=8,
    moe_intermediate_size=768,
)
H100 = Deployment(hardware("h100"))
IDEAL = Efficiency(matmul=1, attention=1, bandwidth=1, link=1, overhead=1e-9)
ATTENTION, FFN = AttentionSpec("keep"), FfnSpec("keep")
DECODE, PREFILL = GridPoint("decode", 1, 1024), GridPoint("prefill", 1, 4096)
SPECS: list[Spec] = [
    ATTENTION,
    AttentionSpec("gqa", num_kv_heads=2),
    AttentionSpec("window", window_tokens=256, sink_tokens=4),
    AttentionSpec("linear"),
    FFN,
    FfnSpec("narrow", intermediate_size=7168),
    FfnSpec("linear"),
]
POINTS = [
    GridPoint(phase, batch, tokens) for phase in ("prefill", "decode") for batch in (1, 64) for tokens in (9, 2048)
]


def ms(spec: Spec, point: GridPoint, setting: Deployment = H100, shape: ModelShape = LLAMA_70B) -> float:
    return estimate(shape, [spec], point, setting)[0].ms


def total(kernels: tuple[Kernel, ...], field: str) -> float:
    return sum(getattr(kernel, field) for kernel in kernels)


def test_decode_of_a_70b_layer_takes_as_long_as_reading_it() -> None:
    """0.856e9 parameters in bf16 at 3.35 TB/s, and some thousandths for KV cache and activations."""
    reading_ms = (2 * 8192 * (8192 + 1024 + 3 * 14336) * 2) / 3.35e12 * 1e3
    assert reading_ms == pytest.approx(0.5109, abs=1e-4)
    attention, ffn = (estimate(LLAMA_70B, [spec], DECODE, H100, IDEAL)[0].ms for spec in (ATTENTION, FFN))
    assert attention + ffn == pytest.approx(reading_ms, rel=0.01)
    assert attention + ffn > reading_ms


def test_prefill_of_a_70b_ffn_takes_as_long_as_computing_it() -> None:
    computing_ms = 2 * 4096 * 3 * 8192 * 28672 / 989.4e12 * 1e3
    pointwise_ms = 4096 * (4 * 8192 + 3 * 28672) * 2 / 3.35e12 * 1e3  # norm and activation cannot overlap with it
    (ffn, _) = estimate(LLAMA_70B, [FFN], PREFILL, H100, IDEAL)
    assert ffn.ms == pytest.approx(computing_ms + pointwise_ms, rel=1e-4)


def test_attention_of_one_decode_step_reads_each_kv_head_once() -> None:
    (kernel,) = [kernel for kernel in site_kernels(ATTENTION, LLAMA_70B, DECODE, H100) if kernel.kind == "attention"]
    assert kernel.kv_bytes == 1025 * 8 * 128 * 2 * 2  # K and V of 8 heads, though 64 heads ask
    assert kernel.flops == 4 * 64 * 128 * 1025
    batch = site_kernels(ATTENTION, LLAMA_70B, replace(DECODE, batch_size=32), H100)
    assert total(batch, "kv_bytes") == 32 * 1026 * 8 * 128 * 2 * 2  # those read, and one written


def test_prefill_attention_is_causal_and_windows_cap_it() -> None:
    point = GridPoint("prefill", 3, 10)
    for window, pairs in ((None, 55), (4, 1 + 2 + 3 + 4 * 7), (10, 55), (20, 55)):
        spec = AttentionSpec("window", window_tokens=window) if window else ATTENTION
        (kernel,) = [one for one in site_kernels(spec, LLAMA_70B, point, H100) if one.kind == "attention"]
        assert kernel.flops == 3 * 4 * 64 * 128 * pairs
        assert kernel.kv_bytes == 3 * 10 * 8 * 128 * 2 * 2  # some query sees every token


def test_windows_and_sinks_cap_what_decode_reads() -> None:
    window = AttentionSpec("window", window_tokens=256, sink_tokens=4)
    inside, on_edge, beyond, far = (
        total(site_kernels(window, LLAMA_70B, GridPoint("decode", 1, tokens), H100), "kv_bytes")
        for tokens in (100, 259, 1000, 100000)
    )
    assert inside < on_edge == beyond == far == 261 * 8 * 128 * 2 * 2
    assert ms(window, GridPoint("decode", 8, 1000)) == ms(window, GridPoint("decode", 8, 100000))
    assert ms(window, GridPoint("decode", 8, 1000)) < ms(ATTENTION, GridPoint("decode", 8, 1000))


@pytest.mark.parametrize("tp", [1, 2, 8, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int4-g128"])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_bytes_are_those_of_the_memory_model(tp: int, dtype: str, bias: bool) -> None:
    setting = replace(H100, weights=dtype, tp=tp)
    shape = replace(LLAMA_70B, qkv_bias=bias, output_bias=bias, mlp_bias=bias, qk_norm=bias, post_norms=bias)
    for spec, point in itertools.product(SPECS, POINTS):
        read = total(site_kernels(spec, shape, point, setting), "weight_bytes")
        assert read == weight_bytes(spec, shape, dtype, tp)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: shape_id(spec, LLAMA_70B))
def test_flops_are_those_of_the_registry(spec: Spec) -> None:
    kernels = site_kernels(spec, LLAMA_70B, GridPoint("decode", 3, 1000), H100)
    assert total(kernels, "flops") == 3 * flops_per_token(spec, LLAMA_70B, 1001)
    prompt = site_kernels(spec, LLAMA_70B, GridPoint("prefill", 2, 300), H100)
    each = [flops_per_token(spec, LLAMA_70B, position) for position in range(1, 301)]
    assert total(prompt, "flops") == pytest.approx(2 * sum(each), rel=1e-12)


def test_kv_bytes_are_those_of_the_memory_model() -> None:
    setting = replace(H100, kv="fp8", tp=2)
    workload = Workload("w", isl=1000, osl=24, kv="fp8", tp=2)
    written = [
        total(site_kernels(spec, LLAMA_70B, GridPoint("prefill", 4, 1024), setting), "kv_bytes") for spec in SPECS
    ]
    for spec, moved in zip(SPECS, written, strict=True):
        if not (isinstance(spec, AttentionSpec) and spec.window_tokens):  # whose cache forgets what was written
            assert moved == 2 * kv_cache_bytes(spec, LLAMA_70B, workload, 4)  # written once and read once


def test_fp8_halves_weight_bytes_and_doubles_the_rate() -> None:
    fp8 = replace(H100, weights="fp8")
    for point in POINTS:
        in_bf16, in_fp8 = (site_kernels(FFN, LLAMA_70B, point, setting) for setting in (H100, fp8))
        assert total(in_fp8, "weight_bytes") == pytest.approx(total(in_bf16, "weight_bytes") / 2, rel=1e-3)  # scales
        assert total(in_fp8, "flops") == total(in_bf16, "flops")
    slow, fast = (estimate(LLAMA_70B, [FFN], PREFILL, setting, IDEAL)[0].ms for setting in (H100, fp8))
    assert 0.5 < fast / slow < 0.6  # what lies between the products stays in 16 bits


@pytest.mark.parametrize("device", HARDWARE)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.id)
@pytest.mark.parametrize("tp", [1, 4])
def test_more_is_never_cheaper(device: str, point: GridPoint, tp: int) -> None:
    setting = Deployment(hardware(device), tp=tp)
    chains: list[list[Spec]] = [
        [FfnSpec("narrow", intermediate_size=size) for size in (1, 256, 7168, 28671)] + [FFN],
        [AttentionSpec("gqa", num_kv_heads=heads) for heads in (1, 2, 4)] + [ATTENTION],
        [AttentionSpec("window", window_tokens=size) for size in (1, 8, 512, 2048)] + [ATTENTION],
        [AttentionSpec("window", window_tokens=4, sink_tokens=sinks) for sinks in (1, 2, 64)],
    ]
    for chain in chains:
        times = [ms(spec, point, setting) for spec in chain]
        assert times == sorted(times)
    longer = replace(point, context_tokens=2 * point.context_tokens)
    larger = replace(point, batch_size=2 * point.batch_size)
    for spec in SPECS:
        assert ms(spec, point, setting) <= ms(spec, longer, setting)
        assert ms(spec, point, setting) <= ms(spec, larger, setting)
        assert ms(spec, larger, setting) <= 2 * ms(spec, point, setting)  # a batch is no worse than one by one


def test_fewer_kv_heads_save_time_only_where_something_reads_them() -> None:
    for context in (128, 32768):
        saved = ms(ATTENTION, GridPoint("decode", 32, context)) - ms(SPECS[1], GridPoint("decode", 32, context))
        kv_ms = 32 * context * 6 * 128 * 2 * 2 / (3.35e12 * 0.8) * 1e3
        assert saved > kv_ms


def test_tensor_parallelism_shares_out_work_and_adds_two_all_reduces_per_layer() -> None:
    one, four = H100, replace(H100, tp=4)
    point = GridPoint("decode", 16, 1024)
    for spec in (ATTENTION, FFN):
        whole, shared = (site_kernels(spec, LLAMA_70B, point, setting) for setting in (one, four))
        assert total(shared, "flops") == total(whole, "flops") / 4
        assert not any(kernel.kind == "collective" for kernel in whole)
        (reduce,) = [kernel for kernel in shared if kernel.kind == "collective"]
        assert reduce.link_bytes == 16 * 8192 * 2 * 2 * 3 / 4  # ring: reduce-scatter and all-gather
        assert kernel_ms(reduce, four, IDEAL) == pytest.approx(1e3 * reduce.link_bytes / 450e9 + 6 * 1.5e-3)
        assert kernel_ms(whole[0], one) == kernel_ms(shared[0], four)  # norms are on every GPU
        assert ms(spec, point, one) / 4 < ms(spec, point, four) < ms(spec, point, one)
    for spec in (AttentionSpec("linear"), FfnSpec("linear")):  # whole on every GPU, nothing to add up
        assert ms(spec, point, one) == ms(spec, point, four)


def test_a_kv_head_is_never_split_over_gpus() -> None:
    eight, sixteen = (site_kernels(ATTENTION, LLAMA_70B, DECODE, replace(H100, tp=tp))[3].kv_bytes for tp in (8, 16))
    assert eight == sixteen == 1025 * 128 * 2 * 2


def test_a_slow_link_costs_more() -> None:
    sxm, pcie = (Deployment(hardware(device), tp=2) for device in ("h100", "h100-pcie"))
    (fast,), (slow,) = (
        [kernel_ms(kernel, setting) for kernel in site_kernels(FFN, LLAMA_70B, PREFILL, setting) if kernel.link_bytes]
        for setting in (sxm, pcie)
    )
    assert slow > 5 * fast


def resolved(kind: str, **sizes: int) -> Spec:
    spec = resolve(FfnSpec(kind, **sizes), QWEN_MOE, 1)  # type: ignore[arg-type]
    assert spec is not None
    return spec


def test_a_batch_reads_the_experts_that_it_touches() -> None:
    experts, expert_bytes = resolved("keep"), 3 * 2048 * 768 * 2
    besides = 2 * (128 * 2048 + 2048)  # router and norm

    def touched(batch_size: int, tp: int = 1) -> float:
        point = GridPoint("decode", batch_size, 100)
        return total(site_kernels(experts, QWEN_MOE, point, replace(H100, tp=tp)), "weight_bytes")

    assert touched(1) == pytest.approx(besides + 8 * expert_bytes)  # one token: exactly its own
    assert touched(2) == pytest.approx(besides + 15.5 * expert_bytes)  # the second meets 1/16 of its own there
    assert touched(100000) == pytest.approx(weight_bytes(experts, QWEN_MOE, "bf16"))
    assert touched(100000, tp=4) == pytest.approx(weight_bytes(experts, QWEN_MOE, "bf16", 4))


def test_experts_compute_for_active_ones_only() -> None:
    point = GridPoint("prefill", 2, 50)
    for spec in (resolved("keep"), resolved("active", num_active_experts=3), resolved("experts", num_experts=64)):
        kernels = site_kernels(spec, QWEN_MOE, point, H100)
        assert total(kernels, "flops") == pytest.approx(100 * flops_per_token(spec, QWEN_MOE, 1))
    for small, large in (
        (resolved("active", num_active_experts=3), resolved("keep")),
        (resolved("experts", num_experts=64), resolved("keep")),
    ):
        for where in POINTS:
            assert ms(small, where, shape=QWEN_MOE) < ms(large, where, shape=QWEN_MOE)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_rest_is_embedding_norm_and_head(tp: int) -> None:
    kernels = rest_kernels(LLAMA_70B, DECODE, replace(H100, tp=tp))
    row = 8192 * 2  # of the embedding, one is read
    head = rest_weight_bytes(LLAMA_70B, "bf16", tp) - 128256 / tp * 8192 * 2
    assert total(kernels, "weight_bytes") == row + head
    assert total(kernels, "flops") == 2 * 8192 * 128256 / tp
    long = rest_kernels(LLAMA_70B, GridPoint("prefill", 1, 1000), replace(H100, tp=tp))
    assert total(long, "flops") == total(kernels, "flops")  # logits of the last token only


def test_costs_are_labelled_estimates_and_hold_for_any_runtime() -> None:
    specs = [FFN, keep_spec(LLAMA_70B, LLAMA_70B.sites[1]), FfnSpec("skip"), FfnSpec("linear"), AttentionSpec("skip")]
    setting = Deployment(hardware("h200"), "fp8", "fp8", 2)
    costs = [cost for point in POINTS for cost in estimate(LLAMA_70B, specs, point, setting)]
    assert {cost.shape_id for cost in costs} == {"ffn.narrow-28672", "ffn.linear", REST}
    assert len(costs) == 3 * len(POINTS)  # each shape once, skip not at all
    assert {(cost.source, cost.engine, cost.tensor_parallel) for cost in costs} == {("estimate", ANY_ENGINE, 2)}
    assert all(cost.ms_p10 == cost.ms == cost.ms_p90 > 0 for cost in costs)
    workload = Workload("w", isl=100, osl=50, weights="fp8", kv="fp8", device="h200", tp=2, runtime="vllm")
    assert CostTable.for_workload(Costs(costs), workload).prefill_ms("ffn.linear", 64, 2048) > 0


def test_overhead_is_paid_per_kernel() -> None:
    double = Efficiency(overhead=2)
    (once, _), (twice, _) = (estimate(LLAMA_70B, [FFN], DECODE, H100, share) for share in (Efficiency(), double))
    assert twice.ms - once.ms == pytest.approx(4 * 2.5e-3)  # norm, gate and up, activation, down


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_efficiency_is_positive(value: float) -> None:
    with pytest.raises(ConfigError, match="efficiency bandwidth must be a positive number"):
        Efficiency(bandwidth=value)


def test_a_precision_that_the_device_lacks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no estimate for fp8 on a100"):
        estimate(LLAMA_70B, [FfnSpec("keep", precision="fp8")], DECODE, Deployment(hardware("a100")))
