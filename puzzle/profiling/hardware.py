"""The hardware sheet: what each known GPU can do at best, from its vendor's data sheet; and what devices are called.

Cost tables and workloads write ``cpu``, ``mps``, ``h200``. A PCIe or NVL board is a device of its own (``h100-pcie``):
an H100 PCIe has 60 % of the bandwidth of an H100 SXM, the plain ``h100``, so a table of the one must not answer for the
other. Only :func:`device_name` asks torch, for a GPU's name.

Rates are *dense* (half of what data sheets print "with sparsity") and count a multiply-add as two. Bandwidths are bytes
per second, those of links in one direction (vendors give the sum of both). What data sheets do not say is the same for
all GPUs and an assumption: a kernel inside a CUDA graph costs ``KERNEL_US`` besides its work (launch, ramp and tail),
a message between GPUs ``NVLINK_US`` or ``PCIE_US``. How much of all this software reaches is ``roofline.Efficiency``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from puzzle import formats
from puzzle.types import ConfigError, Workload

KERNEL_US, NVLINK_US, PCIE_US = 2.5, 1.5, 5.0
GB, TERA = 1e9, 1e12
_VENDORS = {"nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "radeon", "intel"}
# memory sizes, and the form factors that a plain name means; a MIG slice (1g.10gb) is another device
_BOARD = re.compile(r"\d+gb|hbm\d?e?|sxm\d?|oam")


@dataclass(frozen=True)
class Hardware:
    """One GPU. ``flops_per_s``: matrix products by the dtype they are computed in; what is absent, it cannot do.

    ``memory_bytes``: the data sheet's gigabytes of 10^9 bytes, a little less than drivers report. ``fp32`` is the rate
    of full fp32, torch's default, not of TF32.
    """

    device: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float] = field(hash=False)
    link_bytes_per_s: float
    source: str
    link_latency_us: float = NVLINK_US
    kernel_us: float = KERNEL_US

    def matmul_flops_per_s(self, dtype: str) -> float:
        """Dense FLOPs per second of a matrix product in ``dtype``. ConfigError if the GPU has no such rate."""
        if dtype not in self.flops_per_s:
            known = ", ".join(self.flops_per_s)
            raise ConfigError(f"no estimate for {dtype} on {self.device}: its data sheet has rates for {known}")
        return self.flops_per_s[dtype]


def _sheet(
    device: str,
    source: str,
    memory_gb: float,
    gb_per_s: float,
    tflops: tuple[float, float] | tuple[float, float, float],
    nvlink_gb_per_s: float = 0.0,
    pcie_gb_per_s: float = 0.0,
) -> Hardware:
    """``tflops``: of fp32, of bf16 and fp16 (one rate on all of these), and of fp8 where there is that."""
    fp32, half, *fp8 = tflops
    rates = {"fp32": fp32, "bf16": half, "fp16": half} | ({"fp8": fp8[0]} if fp8 else {})
    return Hardware(
        device,
        memory_gb * GB,
        gb_per_s * GB,
        {dtype: rate * TERA for dtype, rate in rates.items()},
        (nvlink_gb_per_s or pcie_gb_per_s) * GB,
        source,
        NVLINK_US if nvlink_gb_per_s else PCIE_US,
    )


_H100, _PCIE_5 = "NVIDIA H100 Tensor Core GPU data sheet", "link: PCIe 5.0 x16, without an NVLink bridge"
_A100, _PCIE_4 = "NVIDIA A100 Tensor Core GPU data sheet", "link: PCIe 4.0 x16"
_B200 = "NVIDIA HGX B200 data sheet, one of eight GPUs"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A, with fp32 accumulation"
HARDWARE: dict[str, Hardware] = {
    sheet.device: sheet
    for sheet in (
        _sheet("h100", f"{_H100}, SXM5 80 GB", 80, 3350, (67, 989.4, 1978.9), nvlink_gb_per_s=450),
        _sheet("h100-pcie", f"{_H100}, PCIe 80 GB; {_PCIE_5}", 80, 2000, (51, 756, 1513), pcie_gb_per_s=64),
        _sheet(
            "h200", "NVIDIA H200 Tensor Core GPU data sheet, SXM", 141, 4800, (67, 989.4, 1978.9), nvlink_gb_per_s=450
        ),
        # the A100 of 40 GB has 1555 GB/s
        _sheet("a100", f"{_A100}, SXM4 80 GB", 80, 2039, (19.5, 312), nvlink_gb_per_s=300),
        _sheet("l40s", f"NVIDIA L40S data sheet; {_PCIE_4}", 48, 864, (91.6, 362, 733), pcie_gb_per_s=32),
        _sheet("rtx-4090", f"{_ADA}; {_PCIE_4}", 24, 1008, (82.6, 165.2, 330.3), pcie_gb_per_s=32),
        _sheet("b200", _B200, 180, 7700, (75, 2250, 4500), nvlink_gb_per_s=900),
    )
}


def hardware(device: str) -> Hardware:
    """The sheet of a device by its name in workloads. ConfigError naming the known ones."""
    if device not in HARDWARE:
        known = ", ".join(HARDWARE)
        raise ConfigError(
            f"no hardware sheet for device {device!r}, so nothing to estimate from; known: {known}; "
            "name one of them as the workload's device, or time this one (profile.backend: measured)"
        )
    return HARDWARE[device]


@dataclass(frozen=True)
class Deployment:
    """What an estimate is for: one GPU of ``tp``, dtypes of weights (and of matrix products) and of the KV cache.

    ConfigError for a dtype that is unknown, or that the GPU cannot compute in.
    """

    hardware: Hardware
    weights: str = "bf16"
    kv: str = "bf16"
    tp: int = 1

    def __post_init__(self) -> None:
        self.hardware.matmul_flops_per_s(formats.format_of(self.weights).compute)
        formats.format_of(self.kv)
        if self.tp < 1:
            raise ConfigError(f"tp must be at least 1, got {self.tp}")

    @classmethod
    def of(cls, workload: Workload) -> Deployment:
        return cls(hardware(workload.device), workload.weights, workload.kv, workload.tp)


def device_slug(marketing_name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` → ``h100``, ``NVIDIA H100 PCIe`` → ``h100-pcie``, ``… RTX 4090`` → ``rtx-4090``."""
    words = [word for word in re.split(r"[\s-]+", marketing_name.lower()) if word]
    kept = [word for word in words if word not in _VENDORS and not _BOARD.fullmatch(word)]
    return "-".join(kept or words)


def device_name(device: str) -> str:
    """The name of a torch device (``cpu``, ``mps``, ``cuda``, ``cuda:1``) in cost tables."""
    if not device.startswith("cuda"):
        return device
    import torch

    return device_slug(torch.cuda.get_device_name(device))
