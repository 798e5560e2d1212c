"""Percentiles, clocks, device names; CUDA graphs where there is a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from puzzle.profiling.hardware import device_name, device_slug
from puzzle.profiling.probes import CapturedGraph, Timing, make_clock

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: captures a CUDA graph")


def test_timing_is_median_and_percentiles() -> None:
    samples = [5.0, 1.0, 4.0, 2.0, 30.0, 3.0]
    timing = Timing.of(samples)
    assert (timing.ms_p10, timing.ms, timing.ms_p90) == pytest.approx(np.quantile(samples, [0.1, 0.5, 0.9]))
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_cpu_clock_runs_the_work_once_per_reading() -> None:
    calls: list[int] = []
    clock = make_clock(lambda: calls.append(1), "cpu")
    readings = [clock() for _ in range(3)]
    assert len(calls) == 3
    assert all(math.isfinite(reading) and reading > 0 for reading in readings)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-mig-1g.10gb"),
    ],
)
def test_device_slugs(name: str, slug: str) -> None:
    assert device_slug(name) == slug


def test_devices_without_a_marketing_name() -> None:
    assert device_name("cpu") == "cpu"
    assert device_name("mps") == "mps"


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_replays_the_work_and_takes_longer_for_more_of_it() -> None:
    left = torch.randn(2048, 2048, device="cuda")
    result = torch.zeros_like(left)
    counter = torch.zeros((), device="cuda")

    def work(products: int) -> None:
        for _ in range(products):
            torch.mm(left, left, out=result)
        counter.add_(1)

    clock = CapturedGraph(lambda: work(1), "cuda")
    before, reading = float(counter), clock()
    assert float(counter) - before == 2  # the untimed replay and the timed one
    assert torch.equal(result, left @ left)
    longer = CapturedGraph(lambda: work(40), "cuda")()
    assert 0 < reading < longer
