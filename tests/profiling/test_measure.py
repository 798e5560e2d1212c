"""What is measured: every shape, real cache contents, the forward that generation runs. No timed assertions."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from puzzle.modeling import FAMILIES, PuzzleConfig
from puzzle.profiling import measure, probes
from puzzle.profiling import stack as stack_module
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.measure import measure_many, measure_point
from puzzle.profiling.memory import kv_cache_bytes
from puzzle.profiling.probes import GraphedSites, MarkedSites, ModelProbe, PointTooLargeError, site_probe
from puzzle.profiling.stack import ForwardStep, PreallocatedCache, PreallocatedLayer, SiteStack, random_model
from puzzle.profiling.table import CostTable
from puzzle.space import SearchSpace
from puzzle.types import AttentionSpec, ConfigError, Costs, FfnSpec, ModelShape, Part, Site, Spec, Workload
from puzzle.variants import block_part, keep_spec, params, shape_id
from tests.tiny_families import make_stock, shape_of

SPECS: tuple[Spec, ...] = (
    AttentionSpec("keep"),
    AttentionSpec("gqa", num_kv_heads=2),
    AttentionSpec("linear"),
    AttentionSpec("skip"),
    FfnSpec("narrow", intermediate_size=40),  # the teacher's width: the same shape as keep
    FfnSpec("narrow", intermediate_size=16),
    FfnSpec("linear"),
    FfnSpec("skip"),
)
SHAPES = {"attention.gqa-4", "attention.gqa-2", "attention.linear", "ffn.narrow-40", "ffn.narrow-16", "ffn.linear"}
PREFILL, DECODE = GridPoint("prefill", 2, 12), GridPoint("decode", 3, 7)
MIX = [
    {"attention": {"kind": "gqa", "num_kv_heads": 2}, "ffn": {"kind": "keep"}},
    {"attention": {"kind": "skip"}, "ffn": {"kind": "narrow", "intermediate_size": 16}},
    {"attention": {"kind": "keep"}, "ffn": {"kind": "linear"}},
]


@pytest.fixture(scope="module")
def stack(shape: ModelShape, teacher_config: PuzzleConfig) -> SiteStack:
    return SiteStack.build(shape, teacher_config, SPECS, "cpu", "fp32")


@pytest.mark.parametrize("point", [PREFILL, DECODE])
def test_a_point_gives_one_cost_per_distinct_shape_and_the_rest(stack: SiteStack, point: GridPoint) -> None:
    costs = measure_point(stack, point, repeats=3, seed=0).costs
    assert sorted(cost.shape_id for cost in costs) == sorted({*SHAPES, "rest"})
    for cost in costs:
        assert (cost.phase, cost.batch_size, cost.context_tokens) == (
            point.phase,
            point.batch_size,
            point.context_tokens,
        )
        assert (cost.device, cost.engine, cost.weights, cost.kv) == ("cpu", "transformers", "fp32", "fp32")
        assert cost.source == "measured" and cost.ms_p10 <= cost.ms <= cost.ms_p90
    assert sum(cost.ms for cost in costs) > 0


def test_costs_answer_for_a_workload_on_this_device(stack: SiteStack) -> None:
    points = (PREFILL, GridPoint("decode", 2, 12))
    rows = tuple(cost for point in points for cost in measure_point(stack, point, 2, 0).costs)
    table = CostTable.for_workload(
        Costs(rows), Workload("w", isl=12, osl=2, batch_sizes=(2,), weights="fp32", kv="fp32")
    )
    for name in ("attention.gqa-2", "attention.gqa-4", "ffn.linear", "rest"):
        assert table.prefill_ms(name, 2, 12) > 0 and table.decode_ms(name, 2, 12, 2) > 0


def test_sites_are_timed_in_a_new_order_every_round(stack: SiteStack, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[tuple[str, ...]] = []
    marked = probes._Readings.marked

    def recorded(self: Any, name: str, layer: Any) -> Any:
        call = marked(self, name, layer)
        return lambda *args, **kwargs: (orders[-1].append(name), call(*args, **kwargs))[1]  # type: ignore[attr-defined]

    monkeypatch.setattr(probes._Readings, "marked", recorded)
    probe, rng = MarkedSites(stack, DECODE), random.Random(0)
    for _ in range(5):
        orders.append([])  # type: ignore[arg-type]
        probe.run(rng)
    assert len(set(map(tuple, orders))) == 5
    assert all(sorted(order) == sorted([*SHAPES, *["neighbour"] * 2, *["empty"] * 2]) for order in orders)


def test_rest_and_sites_are_the_whole_forward(stack: SiteStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that adds one per reading, each layer takes 1 and the forward 1 + 2 per layer."""
    ticks = itertools.count()
    monkeypatch.setattr(probes._Readings, "now_ms", lambda self: float(next(ticks)))
    found = MarkedSites(stack, DECODE).run(random.Random(0))
    num_layers = len(SHAPES) + 2 + 2
    assert found == {**dict.fromkeys(SHAPES, 0.0), "rest": 1 + 2 * num_layers - num_layers + stack.shape.num_layers}


def test_graphs_of_the_stack_telescope_to_the_whole(stack: SiteStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts the layers' sites, every site takes what it adds and the rest what is left."""
    weight = {name: 10.0 + index for index, name in enumerate(stack.sites)}
    keep = weight["attention.gqa-4"] + weight["ffn.narrow-40"]

    def fake_clock(work: Any, device: str, pool: Any) -> Any:
        layers = list(stack.model.model.layers)
        by_layer = {id(layer): weight[name] for name, layer in stack.sites.items()}
        spent = 5.0 + sum(by_layer.get(id(layer), keep) for layer in layers)
        assert layers[0] is stack.neighbours[0] and layers[-1] is stack.neighbours[1]
        return lambda: spent

    monkeypatch.setattr(probes, "make_clock", fake_clock)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    assert GraphedSites(stack, DECODE).run(random.Random(0)) == {"rest": 5.0, **weight}


@pytest.mark.parametrize("point", [PREFILL, DECODE])
def test_every_attention_reads_the_whole_context(
    shape: ModelShape, teacher_config: PuzzleConfig, point: GridPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[tuple[int, ...]] = []
    update = PreallocatedLayer.update

    def recorded(self: PreallocatedLayer, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(self, *args, **kwargs)
        returned.append(tuple(keys.shape))
        cached, written = keys[:, :, : self.cached_tokens], keys[:, :, self.cached_tokens :]
        assert keys.shape == values.shape and bool(cached.ne(0).all()) and torch.equal(written, args[0])
        return keys, values

    monkeypatch.setattr(PreallocatedLayer, "update", recorded)
    ForwardStep(random_model(teacher_config, MIX, "cpu", "fp32"), point)()
    tokens = {"prefill": 12, "decode": 8}[point.phase]
    assert returned == [(point.batch_size, heads, tokens, shape.head_dim) for heads in (2, 4)]


def test_decode_depends_on_every_cached_token(teacher_config: PuzzleConfig) -> None:
    step = ForwardStep(random_model(teacher_config, MIX, "cpu", "fp32"), DECODE)
    logits = step()
    assert torch.equal(step(), logits)  # a repeated step finds the cache as the first one did
    for position in range(DECODE.cached_tokens):
        kept = step.cache.slots[0].values[:, :, position].clone()
        step.cache.slots[0].values[:, :, position] += 100.0
        assert not torch.allclose(step(), logits)
        step.cache.slots[0].values[:, :, position] = kept
    assert torch.equal(step(), logits)


def test_prefill_then_decode_is_the_models_own_generation(teacher_config: PuzzleConfig) -> None:
    """The step that is timed computes what the model computes with transformers' own cache."""
    model = random_model(teacher_config, MIX, "cpu", "fp32")
    prefill, decode = ForwardStep(model, GridPoint("prefill", 3, 7)), ForwardStep(model, DECODE)
    own = DynamicCache()
    with torch.no_grad():
        expected = model(prefill._input_ids, past_key_values=own, use_cache=True).logits[:, -1:]
        assert torch.allclose(prefill(), expected, atol=1e-6)
        for slot, filled in zip(decode.cache.slots, prefill.cache.slots, strict=True):
            slot.keys[:, :, :7], slot.values[:, :, :7] = filled.keys, filled.values
        expected = model(decode._input_ids, past_key_values=own, use_cache=True).logits
    assert torch.allclose(decode(), expected, atol=1e-6)


def test_the_cache_holds_what_memory_predicts(shape: ModelShape, teacher_config: PuzzleConfig) -> None:
    specs = (AttentionSpec("gqa", num_kv_heads=2), AttentionSpec("skip"), AttentionSpec("keep"))
    cache = ForwardStep(random_model(teacher_config, MIX, "cpu", "bf16"), GridPoint("decode", 3, 11)).cache
    workload = Workload("w", isl=9, osl=3)
    held = sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.slots)
    assert held == sum(kv_cache_bytes(spec, shape, workload, 3) for spec in specs) > 0
    assert isinstance(cache, PreallocatedCache)


OFFERED: dict[Part, list[str]] = {
    "attention": ["gqa-1", "window-3", "window-3-sinks-2", "window-1", "linear", "skip"],
    "ffn": ["narrow-24", "experts-3", "active-1", "linear", "skip"],
}


@functools.cache
def family_stack(family: str) -> tuple[SiteStack, tuple[Spec, ...]]:
    """The stack of everything that the tiny model of the family can have, and the specs, each once."""
    stock = make_stock(family)
    family_shape = shape_of(stock)
    offered = {
        part: [name for name in names if has_experts(name) <= bool(family_shape.moe_layers)]
        for part, names in OFFERED.items()
    }
    space = SearchSpace.parse(offered, family_shape)
    specs = tuple({spec: None for item in space.items() for spec in item.specs})
    return SiteStack.build(family_shape, PuzzleConfig.from_family(stock.config), specs, "cpu", "fp32"), specs


def has_experts(name: str) -> bool:
    return name.startswith(("experts", "active"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_shapes_are_measured_as_what_they_are(family: str) -> None:
    stack, specs = family_stack(family)
    by_shape = {shape_id(spec, stack.shape): spec for spec in specs}
    assert set(stack.sites) == set(by_shape) - {"attention.skip", "ffn.skip"}
    for name, layer in stack.sites.items():
        spec = by_shape[name]
        own = sum(parameter.numel() for parameter in layer.parameters())
        assert own == params(spec, stack.shape), name
        if isinstance(spec, AttentionSpec):
            if spec.kind != "linear":
                assert layer.span == (spec.window_tokens, spec.sink_tokens or 0)
        elif spec.num_experts:
            assert layer.mlp.gate.top_k == spec.num_active_experts
    assert stack.neighbour_ids[0] in ("attention.gqa-2", f"attention.gqa-2-window-{stack.shape.window(2)}")
    assert stack.neighbour_ids[1] == ("ffn.experts-6-active-2" if stack.shape.moe_layers else "ffn.narrow-40")
    for point in (PREFILL, DECODE):
        costs = measure_point(stack, point, repeats=1, seed=0).costs
        assert sorted(cost.shape_id for cost in costs) == sorted([*stack.sites, "rest"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_sites_makes_the_teacher_s_masks_only(family: str) -> None:
    stack, _ = family_stack(family)
    step = stack.step(PREFILL)
    assert set(step._made_spans) == {(stack.shape.window(layer), 0) for layer in range(4)}
    others = {(3, 0), (3, 2), (1, 0)} - set(step._made_spans)
    assert set(step._ready_masks) == others


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_holds_what_windows_leave(family: str) -> None:
    """And computes what the model computes with a cache of its own."""
    sinks = {"kind": "window", "window_tokens": 3, "sink_tokens": 2}
    kinds = ({"kind": "keep"}, {"kind": "skip"}, {"kind": "window", "window_tokens": 3}, sinks)
    blocks = [{"attention": kind, "ffn": {"kind": "keep"}} for kind in kinds]
    stock = make_stock(family)
    family_shape, config = shape_of(stock), PuzzleConfig.from_family(stock.config)
    model = random_model(config, blocks, "cpu", "fp32")
    decode, own = ForwardStep(model, DECODE), model.model.new_cache()
    prompt = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(prompt, past_key_values=own, use_cache=True)
        for slot, filled in zip(decode.cache.slots, own.layers, strict=True):
            assert slot.held_tokens == filled.keys.shape[2]
            slot.keys[:, :, :-1], slot.values[:, :, :-1] = filled.keys, filled.values
        expected = model(decode._input_ids, past_key_values=own, use_cache=True).logits
    assert torch.allclose(decode(), expected, atol=1e-5)
    specs = (
        keep_spec(family_shape, Site(0, "attention")),
        AttentionSpec("window", window_tokens=3),
        AttentionSpec("window", window_tokens=3, sink_tokens=2),
    )
    workload = Workload("w", isl=6, osl=2, kv="fp32")
    held = sum(slot.keys.nbytes + slot.values.nbytes for slot in decode.cache.slots)
    assert held == sum(kv_cache_bytes(spec, family_shape, workload, 3) for spec in specs)


def test_whole_models_and_sites_are_measured_in_the_same_rounds(stack: SiteStack, teacher_config: PuzzleConfig) -> None:
    model = random_model(teacher_config, MIX, "cpu", "fp32")
    timings = measure_many([site_probe(stack, DECODE), ModelProbe("student", model, DECODE)], repeats=2, seed=0)
    assert set(timings) == {*SHAPES, "rest", "student"}
    assert 0 < timings["student"].ms < math.inf


class CountingProbe:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def run(self, rng: random.Random) -> Mapping[str, float]:
        self.log.append(self.name)
        return {self.name: float(len(self.log))}


def test_rounds_are_shuffled_repeatable_and_warmed_up() -> None:
    logs: list[list[str]] = []
    for seed in (0, 0, 1):
        logs.append([])
        timings = measure_many([CountingProbe(name, logs[-1]) for name in "abc"], repeats=10, seed=seed)
        assert set(timings) == set("abc")
    rounds = [tuple(logs[0][start : start + 6 : 2]) for start in range(0, len(logs[0]), 6)]
    assert len(rounds) == 10 + measure.WARMUP_ROUNDS and len(set(rounds)) > 1
    assert all(sorted(order) == list("abc") for order in rounds)
    assert logs[0][::2] == logs[0][1::2]  # each runs once untimed before it is timed
    assert logs[0] == logs[1] != logs[2]
    alone: list[str] = []
    assert measure_many([CountingProbe("a", alone)], repeats=3, seed=0)["a"] == probes.Timing.of([3.0, 4.0, 5.0])


def test_two_probes_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="same name"):
        measure_many([CountingProbe("a", []), CountingProbe("a", [])], repeats=1, seed=0)


def test_a_point_that_does_not_fit_says_so(stack: SiteStack, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probes, "MarkedSites", too_large)
    with pytest.raises(PointTooLargeError, match="decode.b3.t7 does not fit in the memory of cpu.*batch size 3 or 7"):
        site_probe(stack, DECODE)


def test_only_dtypes_that_can_be_timed(teacher_config: PuzzleConfig) -> None:
    with pytest.raises(ConfigError, match="'fp8'; allowed: fp32, bf16"):
        random_model(teacher_config, MIX, "cpu", "fp8")  # type: ignore[arg-type]


def test_random_weights_do_not_touch_the_global_seed(shape: ModelShape, teacher_config: PuzzleConfig) -> None:
    state = torch.get_rng_state()
    first, second = (random_model(teacher_config, MIX, "cpu", "fp32", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert first.model.layers[0].self_attn.k_proj.out_features == 2 * shape.head_dim


def test_blocks_are_those_of_the_specs() -> None:
    assert block_part(AttentionSpec("gqa", num_kv_heads=2)) == {"kind": "gqa", "num_kv_heads": 2}
    assert block_part(FfnSpec("narrow", intermediate_size=16)) == {"kind": "narrow", "intermediate_size": 16}
    assert block_part(FfnSpec("skip")) == {"kind": "skip"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: measures by CUDA graphs")
@pytest.mark.parametrize("point", [PREFILL, DECODE])
def test_measuring_on_a_gpu(shape: ModelShape, teacher_config: PuzzleConfig, point: GridPoint) -> None:
    gpu_stack = SiteStack.build(shape, teacher_config, SPECS, "cuda", "bf16")
    model = random_model(teacher_config, MIX, "cuda", "bf16")
    expected = ForwardStep(model, point)()
    probe = ModelProbe("student", model, point)
    timings = measure_many([site_probe(gpu_stack, point), probe], repeats=5, seed=0)
    assert set(timings) == {*SHAPES, "rest", "student"}
    assert 0 < timings["student"].ms < math.inf
    clock = probe._clock
    assert isinstance(clock, probes.CapturedGraph)
    torch.cuda.synchronize()
    assert torch.allclose(clock._result, expected, atol=1e-2)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: measures by CUDA graphs")
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_measuring_windows_and_experts_on_a_gpu(family: str) -> None:
    cpu_stack, specs = family_stack(family)
    config = PuzzleConfig.from_family(make_stock(family).config)
    stack = SiteStack.build(cpu_stack.shape, config, specs, "cuda", "bf16")
    for point in (PREFILL, DECODE):
        assert {cost.shape_id for cost in measure_point(stack, point, 5, 0)} == {*cpu_stack.sites, "rest"}


def test_compiled_layers_are_measured_as_such_every_one_of_them(
    shape: ModelShape, teacher_config: PuzzleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(stack_module, "COMPILE_BACKEND", backend)
    stack = SiteStack.build(shape, teacher_config, SPECS, "cpu", "fp32").compiled()
    plain = SiteStack.build(shape, teacher_config, SPECS, "cpu", "fp32")
    for point in (PREFILL, DECODE):
        before = len(compiled)
        costs = measure_point(stack, point, repeats=2, seed=0).costs
        assert {cost.engine for cost in costs} == {"transformers-compiled"}
        assert len(compiled) - before >= len(SHAPES)
        for name, layer in stack.sites.items():
            stack.use_layers([layer])
            plain.use_layers([plain.sites[name]])
            torch.testing.assert_close(stack.step(point)(), plain.step(point)())
