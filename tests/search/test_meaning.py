"""What a constraint file means for one teacher, in numbers worked out by hand (see test_constraints.py)."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from search_factories import make_costs, make_file, make_items
from test_constraints import GIB, KEEP_ATTENTION, KEEP_FFN, REST

from puzzle.search.meaning import meaning
from puzzle.types import ConfigError, Costs, ModelShape

CHAT = {"isl": 128, "osl": 64, "batch_size": 4}
PLACE = "chat: 128 + 64 tokens, batch size 4, weights bf16, KV cache bf16, cpu, transformers"
TEACHER = REST + 3 * (KEEP_ATTENTION + KEEP_FFN)
UNITS = 0.5 + 3 * (KEEP_ATTENTION + KEEP_FFN) / 10_000
TTFT, TPOT = 8 * UNITS, (1 + 159 / 1024) * UNITS  # of make_costs' straight lines
E2E = TTFT + 63 * TPOT


def told(shape: ModelShape, costs: Costs | None = None, **sections: object) -> list[str]:
    used = make_costs(shape) if costs is None else costs
    return [re.sub(" {2,}", "  ", line) for line in meaning(shape, make_items(shape), used, make_file(**sections))]


def test_each_bound_says_what_it_is_in_numbers_and_whether_the_teacher_keeps_it(shape: ModelShape) -> None:
    lines = told(
        shape,
        workloads={"chat": CHAT},
        constraints={
            "chat.ttft_ms": "50%",
            "output_tok_per_s": {"min": "150%", "max": 5000},
            "params": {"max": 200_000, "min": 5},
            "layers_with_ffn": 3,
            "kl_nats": {"max": 0.5},
        },
    )
    rate = 4 * 64 / (E2E / 1000)
    assert lines == [
        PLACE,
        f"  chat.ttft_ms ≤ 50% of the teacher = {TTFT / 2:.6g} ms  teacher {TTFT:.4g} ms, breaks it",
        f"  output_tok_per_s ≥ 150% of the teacher = {rate * 1.5:.6g} tok/s, so e2e_ms ≤ {E2E / 1.5:.4g} ms"
        f"  teacher {rate:.4g} tok/s, breaks it",
        f"  output_tok_per_s ≤ 5000, so e2e_ms ≥ {4 * 64 / 5:.4g} ms  teacher {rate:.4g} tok/s, keeps it",
        "the model",
        f"  params ≥ 5  teacher {TEACHER:,} parameters, keeps it",
        f"  params ≤ 200000  teacher {TEACHER:,} parameters, keeps it",
        "  layers_with_ffn ≥ 3  teacher 3 layers, keeps it",
        "  kl_nats ≤ 0.5, the sum of the scores  teacher 0",
        "objective: the smallest kl_nats, the sum of the scores; the teacher has 0",
    ]


def test_memory_is_told_by_its_parts(shape: ModelShape) -> None:
    lines = told(shape, workloads={"chat": CHAT}, constraints={"memory_gib": 1})
    match = re.search(r"teacher (\S+) GiB, keeps it \(weights (\S+), KV cache (\S+), workspace (\S+)\)$", lines[1])
    assert match is not None
    total, weights, kv_cache, workspace = map(float, match.groups())
    assert weights == pytest.approx(TEACHER * 2 / GIB, rel=1e-3)
    assert total == pytest.approx(weights + kv_cache + workspace, rel=1e-3)
    assert min(kv_cache, workspace) > 0


def test_every_workload_and_batch_size_is_told_apart(shape: ModelShape) -> None:
    sizes = {"chat": {**CHAT, "batch_size": [1, 4]}, "long": {**CHAT, "isl": 256}}
    lines = told(shape, workloads=sizes, constraints={"memory_gib": 1, "chat.tpot_ms": "90%"})
    places = [line for line in lines if not line.startswith((" ", "objective"))]
    assert [line.split(", weights")[0] for line in places] == [
        "chat: 128 + 64 tokens, batch size 1",
        "chat: 128 + 64 tokens, batch size 4",
        "long: 256 + 64 tokens, batch size 4",
    ]
    assert sum("memory_gib" in line for line in lines) == 3
    assert sum("tpot_ms" in line for line in lines) == 2


def test_estimates_and_what_is_not_known_say_so(shape: ModelShape) -> None:
    measured = make_costs(shape)
    estimates = Costs(tuple(replace(cost, source="estimate") for cost in measured.rows))
    asked: dict[str, object] = {"workloads": {"chat": CHAT}, "constraints": {"ttft_ms": "50%", "params": 5}}
    assert f"teacher {TTFT:.4g} ms, estimated, breaks it" in told(shape, estimates, **asked)[1]
    lines = told(shape, Costs(), **asked)
    assert "ttft_ms ≤ 50%  not known: workload chat: nothing was measured on device cpu" in lines[1]
    assert "params ≤ 5  teacher" in lines[3]


def test_a_list_of_values_a_cost_to_minimise_and_several_solutions(shape: ModelShape) -> None:
    lines = told(
        shape,
        workloads={"chat": {**CHAT, "batch_size": [1, 4]}},
        constraints={"params": {"values": ["50%", 60_000]}, "kl_nats": 1.0},
        objective="chat.output_tok_per_s",
        solutions={"count": 3, "min_difference": 0.4},
    )
    assert (
        f"  params ≤ 50% of the teacher = {TEACHER / 2:.6g} parameters  teacher {TEACHER:,} parameters, breaks it"
        in lines
    )
    assert f"  params ≤ 60000  teacher {TEACHER:,} parameters, breaks it" in lines
    assert "2 searches: params 50%; params 60000" in lines
    (objective,) = [line for line in lines if line.startswith("objective")]
    assert objective.startswith("objective: the largest chat.output_tok_per_s, and then the smallest kl_nats; teacher ")
    assert objective.endswith(f"teacher {4 * 64 / (E2E / 1000):.4g} tok/s at batch size 4")
    assert "up to 3 solutions, any two with other variants at 3 or more of 6 sites" in lines


def test_what_is_not_on_offer_and_what_must_be_lowered(shape: ModelShape) -> None:
    lines = told(shape, constraints={"params": 5}, serve_on=["vllm"])
    assert any(line.startswith("not on offer: vllm refuses attention linear at layers 0-2: ") for line in lines)
    (narrow,) = [line for line in lines if "narrow-48" in line]
    assert narrow.startswith("on offer: vllm needs ffn narrow-48 as 256 channels, those past 48 zeros at layers 0-2: ")
    assert narrow.endswith("its costs are those of that form")


def test_mistakes_are_still_errors(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="unknown metric"):
        told(shape, constraints={"parms": 5})
    with pytest.raises(ConfigError, match="bound the quality"):
        told(shape, objective="params")
