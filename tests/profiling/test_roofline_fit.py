"""The fit finds the efficiency that costs were made with, through noise and outliers, and says when it cannot."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment, hardware
from puzzle.profiling.roofline import Efficiency, estimate, fit_efficiency
from puzzle.types import AttentionSpec, Cost, FfnSpec, MissingMeasurementError, ModelShape, Phase, Spec

LLAMA_8B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False)
H200 = hardware("h200")
TRUE = Efficiency(matmul=0.45, attention=0.3, bandwidth=0.92, link=0.5, overhead=2.5)
SPECS: list[Spec] = [
    AttentionSpec("keep"),
    AttentionSpec("gqa", num_kv_heads=1),
    AttentionSpec("linear"),
    FfnSpec("keep"),
    FfnSpec("narrow", intermediate_size=1536),
]
PHASES: tuple[Phase, Phase] = ("prefill", "decode")


def measured(noise: float = 0.0, tps: tuple[int, ...] = (1,), phases: tuple[Phase, ...] = PHASES) -> list[Cost]:
    """What a GPU of efficiency TRUE would give, ``noise`` being the spread of the log."""
    rng = random.Random(0)
    points = [
        GridPoint(phase, batch, tokens) for phase in phases for batch in (1, 8, 64) for tokens in (128, 1024, 4096)
    ]
    return [
        replace(cost, ms=cost.ms * 2.718 ** rng.gauss(0, noise), source="measured", engine="transformers")
        for tp in tps
        for point in points
        for cost in estimate(LLAMA_8B, SPECS, point, Deployment(H200, tp=tp), TRUE)
    ]


def assert_close(found: Efficiency, expected: Efficiency, tolerance: float) -> None:
    assert asdict(found) == {name: pytest.approx(value, rel=tolerance) for name, value in asdict(expected).items()}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.005), (0.05, 0.1)])
def test_the_fit_recovers_what_costs_were_made_with(noise: float, tolerance: float) -> None:
    found = fit_efficiency(measured(noise, tps=(1, 4)), LLAMA_8B, SPECS, H200)
    assert_close(found.efficiency, TRUE, tolerance)
    assert found.num_costs == 2 * 18 * 5  # the rest is not among them
    assert found.error_after < noise + 1e-3 < 0.15 < found.error_before


def test_an_outlier_hardly_moves_it() -> None:
    costs = measured()
    costs[7] = replace(costs[7], ms=20 * costs[7].ms)
    assert_close(fit_efficiency(costs, LLAMA_8B, SPECS, H200).efficiency, replace(TRUE, link=0.7), 0.05)


def test_what_was_not_measured_stays_as_it_was() -> None:
    start = Efficiency(matmul=0.61, link=0.33)
    found = fit_efficiency(measured(phases=("decode",)), LLAMA_8B, SPECS, H200, start).efficiency
    assert found.link == 0.33  # one GPU
    assert found.matmul == pytest.approx(0.61, rel=0.01)  # at these batches no product of a decode step is bound by it
    assert found.bandwidth == pytest.approx(TRUE.bandwidth, rel=0.01)


def test_estimates_other_devices_and_other_shapes_are_left_out() -> None:
    costs = measured()
    strangers = [
        *(replace(cost, source="estimate", ms=99.0) for cost in costs),
        *(replace(cost, device="h100", ms=99.0) for cost in costs),
        *(replace(cost, shape_id="ffn.narrow-3", ms=99.0) for cost in costs),
    ]
    assert fit_efficiency([*strangers, *costs], LLAMA_8B, SPECS, H200) == fit_efficiency(costs, LLAMA_8B, SPECS, H200)


def test_too_few_measurements_are_an_error_that_counts_them() -> None:
    costs = [cost for cost in measured() if cost.shape_id != "rest"]
    assert fit_efficiency(costs[:12], LLAMA_8B, SPECS, H200).num_costs == 12
    with pytest.raises(MissingMeasurementError, match="h200: 11 measured costs .* 4 numbers need 12"):
        fit_efficiency(costs[:11], LLAMA_8B, SPECS, H200)
    with pytest.raises(MissingMeasurementError, match="l40s: 0 measured costs"):
        fit_efficiency(costs, LLAMA_8B, SPECS, hardware("l40s"))
