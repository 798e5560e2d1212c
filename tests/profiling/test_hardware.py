"""The hardware sheet holds together, and its names are those that devices get."""

from __future__ import annotations

import pytest

from puzzle.profiling.hardware import HARDWARE, Deployment, Hardware, device_slug, hardware
from puzzle.types import ConfigError, Workload

TORCH_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA B200": "b200",
}


def test_the_sheet_is_keyed_by_the_names_that_devices_get() -> None:
    assert set(map(device_slug, TORCH_NAMES)) == set(HARDWARE)
    assert all(device_slug(name) == slug for name, slug in TORCH_NAMES.items())
    assert all(key == sheet.device for key, sheet in HARDWARE.items())


@pytest.mark.parametrize("sheet", HARDWARE.values(), ids=list(HARDWARE))
def test_rates_are_dense_and_in_order(sheet: Hardware) -> None:
    assert sheet.flops_per_s["bf16"] == sheet.flops_per_s["fp16"] > sheet.flops_per_s["fp32"]
    if "fp8" in sheet.flops_per_s:  # tensor cores double their rate with half the bits
        assert sheet.flops_per_s["fp8"] == pytest.approx(2 * sheet.flops_per_s["bf16"], rel=0.02)
    assert sheet.memory_bytes >= 24e9
    assert 100 < sheet.flops_per_s["bf16"] / sheet.bandwidth_bytes_per_s < 500  # FLOPs per byte of all of these
    assert sheet.link_bytes_per_s < sheet.bandwidth_bytes_per_s
    assert "NVIDIA" in sheet.source


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'tpu'.*known: h100, h100-pcie, h200, a100, l40s, rtx-4090, b200"):
        hardware("tpu")


def test_a_dtype_that_the_device_cannot_compute_in_names_those_it_can() -> None:
    with pytest.raises(ConfigError, match="fp8 on a100.*rates for fp32, bf16, fp16"):
        Deployment(hardware("a100"), weights="fp8")
    with pytest.raises(ConfigError, match="int8 on h100.*rates for fp32, bf16, fp16, fp8"):
        Deployment(hardware("h100"), weights="int8")


def test_other_mistakes_in_a_setting() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'fp7'"):
        Deployment(hardware("h100"), kv="fp7")
    with pytest.raises(ConfigError, match="tp must be at least 1"):
        Deployment(hardware("h100"), tp=0)


def test_a_setting_is_a_workloads() -> None:
    workload = Workload("w", isl=1, osl=1, weights="fp8", kv="fp8", device="h200", tp=2, runtime="vllm")
    assert Deployment.of(workload) == Deployment(hardware("h200"), "fp8", "fp8", 2)
    assert Deployment(hardware("a100"), kv="fp8").kv == "fp8"  # stored, not computed in
