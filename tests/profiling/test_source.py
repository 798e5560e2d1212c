"""Where costs come from: estimates for what a constraint file asks, stand-ins that are told, margins that bind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from puzzle import search
from puzzle.config import ConstraintFile, ProfileConfig
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment, hardware
from puzzle.profiling.imported import write_table
from puzzle.profiling.roofline import Efficiency, estimate
from puzzle.profiling.source import CostSource, points_of, with_stand_ins
from puzzle.profiling.table import CostTable
from puzzle.tables import ScoreTable
from puzzle.types import (
    ConfigError,
    Correction,
    Costs,
    CostSetting,
    Gap,
    MissingMeasurementError,
    ModelShape,
    Phase,
    Score,
    Workload,
)
from puzzle.variants import keep_spec, site_item
from tests.profiling.test_table import COSTS, TABLE, WORKLOAD

SHAPE = ModelShape("llama", 2, 64, 8, 8, 8, 512, 96, 4096, tied_embeddings=False)
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
KEEP = tuple(keep_spec(SHAPE, site) for site in SHAPE.sites)
ITEMS = tuple(site_item(site, spec) for site, spec in zip(SHAPE.sites, KEEP, strict=True))


def estimates(folder: Path, *workloads: Workload, **settings: object) -> Costs:
    profile = ProfileConfig.model_validate({"backend": "roofline", **settings})
    return CostSource(profile, folder, SHAPE, KEEP, (), {}, workloads).read()


def test_estimates_answer_for_every_workload_without_a_grid(tmp_path: Path) -> None:
    chat = Workload("chat", 1000, 1000, (3, 7), device="h100", runtime="vllm")
    long = Workload("long", 4000, 17, (1,), device="h200", tp=2, weights="fp8", kv="fp8")
    costs = estimates(tmp_path, chat, long)
    for workload in (chat, long):
        table = CostTable.for_workload(costs, workload)
        assert table.estimated
        for size in workload.batch_sizes:
            assert table.decode_ms("attention.gqa-8", size, workload.isl, workload.osl) > 0
            assert table.prefill_ms("ffn.narrow-512", size, workload.isl) > 0


def test_estimates_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    """A solution is named by them: no set's order, which differs from process to process, may show."""
    workloads = [Workload(f"w{isl}", isl, 8, (1, 2, 4), device="h100") for isl in (100, 101, 102, 103)]
    rows = [cost for cost in estimates(tmp_path, *workloads).rows if cost.phase == "prefill"]
    found = list(dict.fromkeys((cost.context_tokens, cost.batch_size) for cost in rows))
    assert found == [(workload.isl, size) for workload in workloads for size in workload.batch_sizes]


def test_a_table_of_one_device_makes_estimates_of_others_better(tmp_path: Path) -> None:
    slow = Efficiency(matmul=0.3, attention=0.2, bandwidth=0.4)
    points = [GridPoint(phase, size, tokens) for phase in PHASES for size in (1, 64) for tokens in (128, 4000)]
    measured = [
        replace(cost, source="measured", engine="vllm")
        for point in points
        for cost in estimate(SHAPE, KEEP, point, Deployment(hardware("h200")), slow)
    ]
    write_table(tmp_path / "h200.csv", Costs(tuple(measured)), {})
    chat = Workload("chat", 1000, 1000, (64,), device="h100")
    plain, fitted = (estimates(tmp_path, chat, table=table) for table in (None, str(tmp_path / "h200.csv")))
    truth = estimate(SHAPE, KEEP, GridPoint("prefill", 64, 1000), Deployment(hardware("h100")), slow)

    def error(costs: Costs) -> float:
        table = CostTable.for_workload(costs, chat)
        shapes = [cost for cost in truth if cost.shape_id != "rest"]
        return max(abs(table.prefill_ms(cost.shape_id, 64, 1000) / cost.ms - 1) for cost in shapes)

    assert error(fitted) < 0.05 < error(plain)


def test_the_points_of_a_workload_span_its_contexts() -> None:
    points = points_of(Workload("w", 100, 50), 4)
    assert (points[0].phase, points[0].context_tokens) == ("prefill", 100)
    decode = [point.context_tokens for point in points[1:]]
    assert decode[0] == 100 and decode[-1] == 148 and decode == sorted(set(decode))
    assert [point.context_tokens for point in points_of(Workload("w", 100, 1), 4)] == [100, 100]


def test_a_device_without_a_sheet_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no hardware sheet for device 'cpu'.*known: h100"):
        estimates(tmp_path, Workload("w", 8, 8))


def test_stand_ins_are_used_where_told_and_are_estimates() -> None:
    asked = replace(WORKLOAD, device="h100", weights="fp8", kv="fp8")
    with pytest.raises(MissingMeasurementError, match="nothing was measured on device h100"):
        CostTable.for_workload(Costs(tuple(COSTS)), asked)
    table = CostTable.for_workload(Costs(with_stand_ins(COSTS, {"h100": "h200", "fp8": "bf16"})), asked)
    assert table.curves == TABLE.curves
    assert table.estimated
    assert not CostTable.for_workload(Costs(with_stand_ins(COSTS, {"h100": "h200"})), WORKLOAD).estimated


def test_a_gap_is_named_with_its_reason() -> None:
    gaps = (Gap("decode", 64, 512, "out of memory"), Gap("decode", 4, 512, "noise", "ffn.linear"))
    table = CostTable.for_workload(Costs(tuple(COSTS), gaps), WORKLOAD)
    with pytest.raises(MissingMeasurementError, match="batch size 64, 512 tokens could not be measured: out of memory"):
        table.decode_ms("attention.gqa-8", 64, 100, 2)
    with pytest.raises(MissingMeasurementError, match="ffn.linear at decode, batch size 4, 512 tokens .*: noise"):
        table.decode_ms("ffn.linear", 4, 100, 2)
    assert table.decode_ms("attention.gqa-8", 4, 100, 2) == TABLE.decode_ms("attention.gqa-8", 4, 100, 2)


def corrected(error: float, safety: float) -> Costs:
    setting = CostSetting("h200", "bf16", "bf16", 1, "vllm")
    correction = Correction(setting, "decode", 0.5, 2.0, 3.0, error)
    return Costs(tuple(COSTS), corrections=(correction,), safety=safety)


def test_times_are_what_whole_models_say_of_them_in_that_phase_and_setting() -> None:
    table = CostTable.for_workload(corrected(0.02, 1.5), WORKLOAD)
    for name, expected in (("attention.gqa-8", 2.0), ("ffn.narrow-512", 3.0)):
        assert table.decode_ms(name, 4, 100, 50) == expected * TABLE.decode_ms(name, 4, 100, 50)
        assert table.prefill_ms(name, 4, 100) == TABLE.prefill_ms(name, 4, 100)
    assert table.decode_ms("rest", 4, 100, 50) == TABLE.decode_ms("rest", 4, 100, 50) + 0.5
    assert table.margin(("decode",)) == pytest.approx(0.03)
    assert table.margin(("prefill",)) == 0
    elsewhere = replace(
        corrected(0.02, 1.5),
        corrections=(
            replace(corrected(0.02, 1.5).corrections[0], setting=CostSetting("h100", "bf16", "bf16", 1, "vllm")),
        ),
    )
    assert CostTable.for_workload(elsewhere, WORKLOAD).curves == TABLE.curves
    assert not CostTable.for_workload(elsewhere, WORKLOAD).corrections


def test_the_search_keeps_clear_of_limits_by_the_margin() -> None:
    file = ConstraintFile.model_validate(
        {
            "workloads": {"chat": {"isl": 100, "osl": 50, "batch_size": 4, "device": "h200", "runtime": "vllm"}},
            "constraints": {"tpot_ms": 10.0, "ttft_ms": 20.0, "output_tok_per_s": {"min": 1.0}},
        }
    )
    scores = ScoreTable.of([Score(ITEMS[0].id, "teacher", "teacher", "kl", "score", (0.0, 0.0), 512)])
    (problem,) = search.problems(SHAPE, ITEMS, scores, corrected(0.02, 1.5), file)
    tpot, ttft, rate = problem.rows
    assert float(tpot.upper or 0) == pytest.approx(9.7)
    assert "3.0% clear of it for the error of predicted times" in tpot.written
    assert ttft.upper == 20 and "clear" not in ttft.written
    assert float(rate.lower or 0) == pytest.approx(1 / 0.97)
    with pytest.raises(ConfigError, match="tpot_ms: predicted times are too uncertain .* profile.safety"):
        search.problems(SHAPE, ITEMS, scores, corrected(0.5, 2), file)
