"""Interpolation and integral against sums over every single context; errors that say what to measure."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import numpy as np
import pytest

from puzzle.profiling.table import ANY_ENGINE, CostTable
from puzzle.types import CorruptFileError, Cost, Costs, MissingMeasurementError, Phase, Workload

WORKLOAD = Workload("chat", isl=100, osl=50, weights="bf16", kv="bf16", device="h200", runtime="vllm")
LENGTHS = (16, 64, 100, 256)
MS = {  # (shape, phase) → ms at LENGTHS, neither straight nor monotone
    ("attention.gqa-8", "prefill"): (1.0, 3.0, 2.5, 9.0),
    ("attention.gqa-8", "decode"): (0.5, 0.25, 0.75, 2.0),
    ("ffn.narrow-512", "prefill"): (2.0, 4.0, 7.0, 20.0),
    ("ffn.narrow-512", "decode"): (0.1, 0.1, 0.1, 0.1),
    ("rest", "prefill"): (0.5, 0.5, 0.6, 0.9),
    ("rest", "decode"): (0.3, 0.3, 0.3, 0.3),
}


def cost(shape_id: str, phase: Phase, tokens: int, ms: float, batch_size: int = 4, device: str = "h200") -> Cost:
    return Cost(shape_id, phase, batch_size, tokens, "bf16", "bf16", device, 1, "vllm", ms, ms, ms, "measured")


COSTS = [
    cost(shape_id, phase, tokens, ms)  # type: ignore[arg-type]
    for (shape_id, phase), values in MS.items()
    for tokens, ms in zip(LENGTHS, values, strict=True)
]
TABLE = CostTable.for_workload(Costs(tuple(reversed(COSTS))), WORKLOAD)


@pytest.mark.parametrize("isl", [16, 17, 63, 64, 65, 99, 100, 101, 200, 255, 256])
def test_prefill_is_the_piecewise_linear_interpolant(isl: int) -> None:
    expected = np.interp(isl, LENGTHS, MS["attention.gqa-8", "prefill"])
    assert TABLE.prefill_ms("attention.gqa-8", 4, isl) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("isl", [16, 20, 63, 64, 90, 100])
@pytest.mark.parametrize("osl", [1, 2, 3, 10, 37, 50, 86, 120, 158])
def test_decode_is_the_mean_over_every_step(isl: int, osl: int) -> None:
    contexts = range(isl, isl + osl - 1) or [isl]  # osl 1: the value at isl
    steps = [float(np.interp(context, LENGTHS, MS["attention.gqa-8", "decode"])) for context in contexts]
    assert TABLE.decode_ms("attention.gqa-8", 4, isl, osl) == pytest.approx(statistics.fmean(steps), rel=1e-12)


def test_decode_reaches_the_last_measured_context_and_not_one_further() -> None:
    assert TABLE.decode_ms("attention.gqa-8", 4, 256, 2) == 2.0
    assert TABLE.decode_ms("attention.gqa-8", 4, 16, 242) > 0
    with pytest.raises(MissingMeasurementError, match="257 tokens lie outside the measured 16 to 256"):
        TABLE.decode_ms("attention.gqa-8", 4, 16, 243)


def test_skip_costs_nothing_even_where_nothing_was_measured() -> None:
    assert TABLE.prefill_ms("attention.skip", 999, 10**6) == 0.0
    assert TABLE.decode_ms("ffn.skip", 999, 10**6, 10) == 0.0


@pytest.mark.parametrize(
    ("shape_id", "phase", "batch_size", "isl", "osl", "message"),
    [
        ("rest", "prefill", 4, 8, 1, r"rest at prefill, batch size 4: 8 tokens lie outside .*add 8 to prefill_tokens"),
        ("rest", "prefill", 4, 300, 1, r"add 300 to prefill_tokens"),
        ("rest", "decode", 4, 8, 400, r"8 and 406 tokens lie .* add 8 and 406 to decode_context_tokens"),
        ("rest", "decode", 8, 64, 4, r"batch size 8 was not measured \(measured: 4\); add 8 to batch_sizes"),
        (
            "ffn.linear",
            "decode",
            4,
            64,
            4,
            r"ffn.linear at decode was never measured on h200; .* decode_context_tokens",
        ),
    ],
)
def test_outside_the_grid_names_what_is_missing_and_the_command(
    shape_id: str, phase: str, batch_size: int, isl: int, osl: int, message: str
) -> None:
    lengths = (isl,) if phase == "prefill" else (isl, osl)
    with pytest.raises(MissingMeasurementError, match=message) as caught:
        getattr(TABLE, f"{phase}_ms")(shape_id, batch_size, *lengths)
    assert "workload chat" in str(caught.value)
    assert "`puzzle profile RUN --set profile.grid=GRID.yaml`" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "workload",
    [
        Workload("chat", 100, 50, device="a100", runtime="vllm"),
        Workload("chat", 100, 50, device="h200", runtime="transformers"),
        Workload("chat", 100, 50, device="h200", runtime="vllm", weights="fp8"),
        Workload("chat", 100, 50, device="h200", runtime="vllm", kv="fp8"),
        Workload("chat", 100, 50, device="h200", runtime="vllm", tp=2),
    ],
)
def test_rows_of_another_setting_are_not_used(workload: Workload) -> None:
    asked = f"device {workload.device} with weights {workload.weights}, kv {workload.kv}, tp {workload.tp}"
    there = "measured: device h200 with weights bf16, kv bf16, tp 1, runtime vllm"
    with pytest.raises(MissingMeasurementError, match=re.escape(asked)) as caught:
        CostTable.for_workload(Costs(tuple(COSTS)), workload)
    assert there in str(caught.value) and "`puzzle profile RUN --set profile.grid=" in str(caught.value)


def test_rows_of_another_device_do_not_mix_in() -> None:
    table = CostTable.for_workload(Costs((*COSTS, cost("rest", "prefill", 64, 99.0, device="a100"))), WORKLOAD)
    assert table.prefill_ms("rest", 4, 64) == 0.5


def test_nothing_measured_at_all() -> None:
    with pytest.raises(MissingMeasurementError, match="measured: nothing"):
        CostTable.for_workload(Costs(), WORKLOAD)


def test_a_point_measured_twice_is_an_error() -> None:
    with pytest.raises(CorruptFileError, match="rest is there twice at prefill, batch size 4, 64 tokens"):
        CostTable.for_workload(Costs((*COSTS, cost("rest", "prefill", 64, 0.5))), WORKLOAD)


def test_costs_for_any_runtime_serve_each_but_no_other_device() -> None:
    estimates = Costs(tuple(replace(cost, engine=ANY_ENGINE, source="estimate") for cost in COSTS))
    for runtime in ("vllm", "transformers"):
        table = CostTable.for_workload(estimates, replace(WORKLOAD, runtime=runtime))
        assert table.curves == TABLE.curves and table.estimated and not TABLE.estimated
    with pytest.raises(MissingMeasurementError, match="nothing was measured on device h100"):
        CostTable.for_workload(estimates, replace(WORKLOAD, device="h100"))
