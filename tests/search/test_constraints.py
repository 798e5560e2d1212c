"""Every metric against numbers worked out by hand, and every mistake in a constraint file against its message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import pytest
from search_factories import make_costs, make_file, make_items, make_score, make_scores

from puzzle.config import ConstraintFile
from puzzle.search.constraints import bounds, problems, usable_items, workloads
from puzzle.search.metrics import METRICS, Setting, quantity
from puzzle.search.problem import Problem
from puzzle.tables import Failure, ScoreTable
from puzzle.types import ConfigError, Costs, MissingMeasurementError, ModelShape, Workload
from puzzle.yamlfiles import load, locate

CHAT = {"isl": 128, "osl": 64, "batch_size": 4}
# of one layer, by hand: attention 64*(64+2*kv) + 64*64 + 64 with kv = heads*16; FFN 3*64*width + 64
KEEP_ATTENTION, GQA2, LINEAR, KEEP_FFN, NARROW48 = 16448, 12352, 4160, 18496, 9280
REST = 2 * 128 * 64 + 64
MIXED = (
    "L000.attention.keep",
    "L000.ffn.narrow-48",
    "L001.attention.gqa-2",
    "L001.ffn.skip",
    "L002.attention.skip",
    "L002.ffn.linear",
)
MIXED_PARAMS = REST + KEEP_ATTENTION + NARROW48 + GQA2 + 0 + 0 + LINEAR
PREFILL = 4 * 128 / 64 * (0.5 + (MIXED_PARAMS - REST) / 10_000)
# 63 steps find 128 ... 190 tokens: 159 on average
DECODE = (1 + 159 / 1024) * (0.5 + (MIXED_PARAMS - REST) / 10_000)
E2E = PREFILL + 63 * DECODE
GIB = 2**30
KV = (4 + 2) * 2 * 16 * 2 * 192 * 4  # heads * (K and V) * head_dim * bf16 * tokens * batch
WORKSPACE = 4 * 128 * (4 * 64 + 2 * 16 + (4 * 4 + 2 * 4) * 16) * 2 + 4 * 128 * 4
BY_HAND = {
    "memory_gib": (MIXED_PARAMS * 2 + KV + WORKSPACE) / GIB,
    "weights_gib": MIXED_PARAMS * 2 / GIB,
    "kv_cache_gib": KV / GIB,
    "ttft_ms": PREFILL,
    "tpot_ms": DECODE,
    "e2e_ms": E2E,
    "output_tok_per_s": 4 * 64 / (E2E / 1000),
    "total_tok_per_s": 4 * 192 / (E2E / 1000),
    "req_per_s": 4 / (E2E / 1000),
    "params": MIXED_PARAMS,
    "active_params": MIXED_PARAMS,  # without experts a token meets them all
    "layers_with_attention": 2,
    "layers_with_ffn": 1,
    "kv_heads_total": 6,
}


def test_what_a_runtime_lowers_costs_what_its_form_costs(shape: ModelShape) -> None:
    """Every reader of nemotron-nas pads an FFN to 256 channels; the teacher that percentages are of is not one."""
    ids = tuple(item_id.replace("linear", "keep") for item_id in MIXED if "attention.skip" not in item_id)
    padded = 3 * 64 * 256 + 64
    here, there = {**CHAT, "runtime": "transformers"}, {**CHAT, "runtime": "vllm"}
    file = make_file(
        workloads={"here": here, "there": there},
        constraints={"params": "100%", "here.weights_gib": "100%", "there.weights_gib": "100%"},
        serve_on=["transformers", "vllm"],
    )
    (problem,) = build(shape, file)
    narrow, keep = "L000.ffn.narrow-48", "L002.ffn.keep"
    for name, unit, of in (("params", 1, padded), ("there.weights_gib", 2 / GIB, padded)):
        quantity_of = problem.quantity(name)
        assert [quantity_of.coefficients[one] for one in (narrow, keep)] == pytest.approx([of * unit] * 2)
    own = problem.quantity("here.weights_gib").coefficients
    assert [own[one] for one in (narrow, keep)] == pytest.approx([NARROW48 * 2 / GIB, KEEP_FFN * 2 / GIB])
    assert problem.quantity("layers_with_ffn").coefficients[narrow] == 1
    teacher = REST + 3 * (KEEP_ATTENTION + KEEP_FFN)
    assert [float(row.upper or 0) for row in problem.rows] == pytest.approx(
        [teacher, teacher * 2 / GIB, teacher * 2 / GIB]
    )
    assert not problem.rows[0].holds([f"{site}.keep" for site in shape.sites])  # padded, it is larger than itself
    assert float(problem.quantity("params").value(ids)) == MIXED_PARAMS - NARROW48 - LINEAR + 2 * padded


def test_times_measured_in_a_runtime_are_of_its_own_form(shape: ModelShape) -> None:
    """It has padded what was measured; parameters are counted padded."""
    chat, items = {**CHAT, "runtime": "vllm"}, make_items(shape)
    costs = Costs(tuple(replace(cost, engine="vllm") for cost in make_costs(shape).rows))

    def coefficients(name: str, serve_on: list[str]) -> Mapping[str, float]:
        file = make_file(workloads={"chat": chat}, constraints={"chat.ttft_ms": 50}, serve_on=serve_on)
        (problem,) = problems(shape, items, make_scores(items), costs, file)
        return problem.quantity(name).coefficients

    served, alone = coefficients("chat.ttft_ms", ["vllm"]), coefficients("chat.ttft_ms", [])
    assert served == {item_id: alone[item_id] for item_id in served}
    assert coefficients("params", ["vllm"])["L000.ffn.keep"] > coefficients("params", [])["L000.ffn.keep"]


def build(shape: ModelShape, file: ConstraintFile, scores: ScoreTable | None = None) -> tuple[Problem, ...]:
    items = make_items(shape)
    return problems(shape, items, scores or make_scores(items), make_costs(shape), file)


def teacher_ids(shape: ModelShape) -> list[str]:
    return [f"{site}.keep" for site in shape.sites]


@pytest.mark.parametrize("metric", METRICS)
def test_value_is_the_one_computed_by_hand(shape: ModelShape, metric: str) -> None:
    (problem,) = build(shape, make_file(workloads={"chat": CHAT}))
    name = metric if METRICS[metric].workload == "none" else f"chat.{metric}"
    assert problem.totals(MIXED)[name] == pytest.approx(BY_HAND[metric], rel=1e-12)


def test_tensor_parallel_memory_is_per_gpu(shape: ModelShape) -> None:
    """Two GPUs: half the heads, channels and vocabulary on each; the norms on both."""
    items = make_items(shape)
    setting = Setting(shape, Workload("chat", 128, 64, tp=2), 4)
    halves = quantity("weights_gib", setting, items).value(teacher_ids(shape))
    norms, total = 7 * 64, REST + 3 * (KEEP_ATTENTION + KEEP_FFN)
    assert halves * GIB == ((total - norms) / 2 + norms) * 2


@pytest.mark.parametrize(
    ("metric", "lower", "upper"),
    [("memory_gib", None, 2), ("output_tok_per_s", 2, None), ("params", None, 2), ("layers_with_ffn", 2, None)],
)
def test_scalar_takes_the_natural_direction(
    shape: ModelShape, metric: str, lower: int | None, upper: int | None
) -> None:
    (problem,) = build(shape, make_file(workloads={"chat": CHAT}, constraints={metric: 2}))
    (row,) = problem.rows
    assert (row.lower, row.upper) == (lower, upper)


def test_rate_bound_is_the_same_as_the_time_bound(shape: ModelShape) -> None:
    (problem,) = build(
        shape, make_file(workloads={"chat": CHAT}, constraints={"output_tok_per_s": {"min": 400, "max": 800}})
    )
    at_least, at_most = problem.rows
    assert at_least.linear_bounds() == (None, Fraction(4 * 64 * 1000, 400))
    assert at_most.linear_bounds() == (Fraction(4 * 64 * 1000, 800), None)
    rate = at_least.quantity.value(MIXED)
    assert at_least.holds(MIXED) == (rate >= 400)
    assert at_most.holds(MIXED) == (rate <= 800)


@pytest.mark.parametrize("metric", ["memory_gib", "chat.ttft_ms", "output_tok_per_s", "params"])
def test_the_teacher_itself_keeps_a_bound_of_100_percent(shape: ModelShape, metric: str) -> None:
    (problem,) = build(shape, make_file(workloads={"chat": CHAT}, constraints={metric: "100%"}))
    (row,) = problem.rows
    assert row.holds(teacher_ids(shape))
    assert row.quantity.value(teacher_ids(shape)) == (row.lower or row.upper)


def test_percentage_is_of_the_teacher_at_the_same_workload_and_batch_size(shape: ModelShape) -> None:
    file = make_file(workloads={"chat": {**CHAT, "batch_size": [1, 4]}}, constraints={"ttft_ms": "75%"})
    limits = [problem.rows[0].upper for problem in build(shape, file)]
    teacher_units = 0.5 + 3 * (KEEP_ATTENTION + KEEP_FFN) / 10_000
    assert [float(limit or 0) for limit in limits] == pytest.approx([1.5 * teacher_units, 6 * teacher_units])


def test_unprefixed_metric_binds_every_workload(shape: ModelShape) -> None:
    file = make_file(workloads={"chat": CHAT, "long": {**CHAT, "isl": 256}}, constraints={"memory_gib": 1, "params": 9})
    (problem,) = build(shape, file)
    assert [row.quantity.name for row in problem.rows] == ["chat.memory_gib", "long.memory_gib", "params"]
    assert [row.written for row in problem.rows] == ["memory_gib ≤ 1 (chat)", "memory_gib ≤ 1 (long)", "params ≤ 9"]


def test_weights_need_no_workload_and_are_bf16_then(shape: ModelShape) -> None:
    (problem,) = build(shape, make_file(constraints={"weights_gib": 1}))
    assert problem.totals(MIXED)["weights_gib"] == MIXED_PARAMS * 2 / GIB


def test_batch_sizes_combine_in_the_order_of_the_file(shape: ModelShape) -> None:
    sizes = {"chat": {**CHAT, "batch_size": [1, 4]}, "long": {**CHAT, "batch_size": [4, 1]}}
    made = build(shape, make_file(workloads=sizes, constraints={}))
    found = [(made_.totals(MIXED)["chat.batch_size"], made_.totals(MIXED)["long.batch_size"]) for made_ in made]
    assert found == [(1, 4), (1, 1), (4, 4), (4, 1)]


def test_percentage_of_a_rate_refers_to_the_best_batch_size_at_which_the_teacher_fits(shape: ModelShape) -> None:
    chat = {**CHAT, "batch_size": [1, 4]}
    alone = build(shape, make_file(workloads={"chat": chat}, constraints={}))
    rates = [Fraction(problem.totals(teacher_ids(shape))["chat.output_tok_per_s"]) for problem in alone]
    memory = [problem.totals(teacher_ids(shape))["chat.memory_gib"] for problem in alone]
    assert rates[1] > rates[0]

    def reference(limit: float) -> float:
        file = make_file(workloads={"chat": chat}, constraints={"memory_gib": limit, "output_tok_per_s": "100%"})
        lower = {problem.rows[1].lower for problem in build(shape, file)}
        assert len(lower) == 1
        return float(lower.pop() or 0)

    assert reference(memory[1]) == pytest.approx(float(rates[1]))
    assert reference((memory[0] + memory[1]) / 2) == pytest.approx(float(rates[0]))
    with pytest.raises(ConfigError, match=r"teacher fits memory_gib ≤ .* at none of the batch sizes of chat"):
        reference(memory[0] / 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"constraints": {"memory_gb": 1}}, "unknown metric 'memory_gb'; did you mean 'memory_gib'"),
        (
            {"workloads": {"chat": CHAT}, "constraints": {"chta.ttft_ms": 1}},
            "unknown workload 'chta'; did you mean 'chat'",
        ),
        ({"workloads": {"chat": CHAT}, "constraints": {"chat.params": 1}}, "write 'params' alone"),
        ({"constraints": {"ttft_ms": 1}}, "ttft_ms needs a workload"),
        ({"workloads": {"chat": CHAT}, "constraints": {"memory_gib": {"eq": 1}}}, "eq is for whole numbers"),
        ({"workloads": {"chat": CHAT}, "constraints": {"req_per_s": 0}}, "a rate must be positive"),
        ({"workloads": {"chat": {**CHAT, "batch_size": []}}}, "the list is empty"),
        ({"workloads": {"chat": {**CHAT, "kv": "fp9"}}}, "unknown dtype 'fp9'"),
        ({"workloads": {"chat": {**CHAT, "isl": 500}}}, "isl \\+ osl is 564 tokens, the teacher takes at most 512"),
        (
            {"workloads": {name: {**CHAT, "batch_size": list(range(1, 41))} for name in ("chat", "long")}},
            "batch sizes are 1,600 combinations; at most 1,000",
        ),
        ({"objective": "mmlu"}, "'mmlu' is not on offer; allowed: kl_nats, ce_delta_nats"),
    ],
)
def test_mistakes_are_config_errors_that_say_what_is_allowed(
    shape: ModelShape, sections: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(shape, make_file(**sections))


def test_bound_on_what_nobody_measured_is_an_error_and_an_unbound_one_is_absent(shape: ModelShape) -> None:
    elsewhere = {"chat": {**CHAT, "device": "h200"}}
    with pytest.raises(MissingMeasurementError, match="device h200"):
        build(shape, make_file(workloads=elsewhere, constraints={"ttft_ms": 1}))
    (problem,) = build(shape, make_file(workloads=elsewhere, constraints={"memory_gib": 1}))
    names = set(problem.totals(MIXED))
    assert "chat.memory_gib" in names
    assert "chat.ttft_ms" not in names


def test_scores_hold_up_to_the_context_they_were_measured_at(shape: ModelShape) -> None:
    items = make_items(shape)
    scores = ScoreTable.of(make_score(item.id, 1.0, context_tokens=128) for item in items)
    with pytest.raises(
        MissingMeasurementError, match=r"192 tokens, but .* scored on 128; shorten it, or set data.sequence_tokens"
    ):
        build(shape, make_file(workloads={"chat": CHAT}), scores)


def test_unscored_item_is_missing_but_a_failed_one_falls_away(shape: ModelShape) -> None:
    items = make_items(shape)
    lost = "L001.ffn.narrow-48"
    some = [score for score in make_scores(items).scores.values() if score.item_id != lost]
    with pytest.raises(MissingMeasurementError, match=f"no kl score for {lost}; run `puzzle score RUN`"):
        usable_items(items, ScoreTable.of(some), "kl")
    left = usable_items(items, ScoreTable.of(some, [Failure(lost, "diverged")]), "kl")
    assert {item.id for item in items} - {item.id for item in left} == {lost}
    assert all(score == 0 for item, score in left.items() if item.specs[0].kind == "keep")


@pytest.mark.parametrize("name", ["half-memory", "chat-latency"])
def test_shipped_file_is_understood(name: str) -> None:
    file = load(ConstraintFile, locate("constraints", name))
    long_enough = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False)
    assert bounds(file)
    assert workloads(file, long_enough)
