"""The hardware sheet: what each known GPU can do at best, from its vendor's data sheet. Pure data.

Rates are *dense* (half of what data sheets print "with sparsity") and count a multiply-add as two. Bandwidths are bytes
per second, those of links in one direction (vendors give the sum of both). What data sheets do not say is the same for
all GPUs and an assumption: a kernel inside a CUDA graph costs ``KERNEL_US`` besides its work (launch, ramp and tail),
a message between GPUs ``NVLINK_US`` or ``PCIE_US``. How much of all this software reaches is ``roofline.Efficiency``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from puzzle import formats
from puzzle.types import ConfigError, Workload

KERNEL_US, NVLINK_US, PCIE_US = 2.5, 1.5, 5.0
GB, TERA = 1e9, 1e12


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


def _rates(fp32: float, half: float, fp8: float | None = None) -> dict[str, float]:
    """TFLOPS by dtype; bf16 and fp16 run at one rate on all of these."""
    rates = {"fp32": fp32, "bf16": half, "fp16": half} | ({"fp8": fp8} if fp8 else {})
    return {dtype: rate * TERA for dtype, rate in rates.items()}


HARDWARE: dict[str, Hardware] = {
    sheet.device: sheet
    for sheet in (
        Hardware(
            device="h100",
            memory_bytes=80 * GB,
            bandwidth_bytes_per_s=3350 * GB,
            flops_per_s=_rates(fp32=67, half=989.4, fp8=1978.9),
            link_bytes_per_s=450 * GB,
            source="NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB",
        ),
        Hardware(
            device="h100-pcie",
            memory_bytes=80 * GB,
            bandwidth_bytes_per_s=2000 * GB,
            flops_per_s=_rates(fp32=51, half=756, fp8=1513),
            link_bytes_per_s=64 * GB,
            link_latency_us=PCIE_US,
            source="NVIDIA H100 Tensor Core GPU data sheet, PCIe 80 GB; link: PCIe 5.0 x16, without an NVLink bridge",
        ),
        Hardware(
            device="h200",
            memory_bytes=141 * GB,
            bandwidth_bytes_per_s=4800 * GB,
            flops_per_s=_rates(fp32=67, half=989.4, fp8=1978.9),
            link_bytes_per_s=450 * GB,
            source="NVIDIA H200 Tensor Core GPU data sheet, SXM",
        ),
        Hardware(
            device="a100",
            memory_bytes=80 * GB,
            bandwidth_bytes_per_s=2039 * GB,
            flops_per_s=_rates(fp32=19.5, half=312),
            link_bytes_per_s=300 * GB,
            source="NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB (the one of 40 GB has 1555 GB/s)",
        ),
        Hardware(
            device="l40s",
            memory_bytes=48 * GB,
            bandwidth_bytes_per_s=864 * GB,
            flops_per_s=_rates(fp32=91.6, half=362, fp8=733),
            link_bytes_per_s=32 * GB,
            link_latency_us=PCIE_US,
            source="NVIDIA L40S data sheet; link: PCIe 4.0 x16",
        ),
        Hardware(
            device="rtx-4090",
            memory_bytes=24 * GB,
            bandwidth_bytes_per_s=1008 * GB,
            flops_per_s=_rates(fp32=82.6, half=165.2, fp8=330.3),
            link_bytes_per_s=32 * GB,
            link_latency_us=PCIE_US,
            source="NVIDIA Ada GPU architecture white paper, appendix A, with fp32 accumulation; link: PCIe 4.0 x16",
        ),
        Hardware(
            device="b200",
            memory_bytes=180 * GB,
            bandwidth_bytes_per_s=7700 * GB,
            flops_per_s=_rates(fp32=75, half=2250, fp8=4500),
            link_bytes_per_s=900 * GB,
            source="NVIDIA HGX B200 data sheet, one of eight GPUs",
        ),
    )
}


def hardware(device: str) -> Hardware:
    """The sheet of a device by its name in workloads (device.py). ConfigError naming the known ones."""
    if device not in HARDWARE:
        raise ConfigError(f"no hardware sheet for device {device!r}, so nothing to estimate from; known: {_known()}")
    return HARDWARE[device]


def _known() -> str:
    return ", ".join(HARDWARE)


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
