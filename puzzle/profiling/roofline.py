"""Milliseconds without a measurement: a roofline over the kernels of each shape, from the hardware sheet. Pure.

Reads shapes, resolved specs and a Deployment; gives Cost records, labelled ``estimate``, that hold for any runtime.
Of each kernel (kernels.py), on one of tp GPUs::

    ms = max(FLOPs / (rate * share), bytes / (bandwidth * share)) + overhead
    collective: ms = bytes sent / (link bandwidth * share) + messages * latency + overhead

so that a kernel's reading and computing overlap, and its launch and the next kernel do not. The shares that software
reaches of the data sheet are an Efficiency: its defaults are what well-tuned kernels reach on large shapes; where
measurements exist, roofline_fit.py fits them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment
from puzzle.profiling.kernels import Kernel, rest_kernels, site_kernels
from puzzle.profiling.table import ANY_ENGINE, REST, SKIPPED
from puzzle.types import ConfigError, Cost, CostSetting, ModelShape, Spec
from puzzle.variants import shape_id


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the data sheet: shares of its rates, and how many times the sheet's kernel overhead is paid.

    ``matmul`` and ``attention``: of the dense rate (defaults: large bf16 products reach 60 to 80 % of it on Hopper and
    Ampere, FlashAttention-2 about half). ``bandwidth``: of the memory's, for whatever streams weights, KV cache or
    activations (copies reach 90 %, skinny products and decode attention 70 to 85 %). ``link``: of the link's. A fitted
    bandwidth may exceed 1: small shapes live in the caches. The defaults were set before any comparison with
    published figures (benchmarks/bench_roofline.py) and are not tuned to one.
    """

    matmul: float = 0.7
    attention: float = 0.5
    bandwidth: float = 0.8
    link: float = 0.7
    overhead: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"efficiency {field.name} must be a positive number, got {value}")


DEFAULT = Efficiency()


def estimate(
    shape: ModelShape,
    specs: Iterable[Spec],
    point: GridPoint,
    deployment: Deployment,
    efficiency: Efficiency = DEFAULT,
) -> tuple[Cost, ...]:
    """The estimated costs of every distinct shape among ``specs`` but skip, and of the rest, at one point of the grid.

    ``specs`` are resolved, and may repeat. An estimate has no spread: p10 and p90 equal the value. ConfigError for a
    spec's precision that the device cannot compute in.
    """
    kernels: dict[str, tuple[Kernel, ...]] = {}
    for spec in specs:
        name = shape_id(spec, shape)
        if name not in SKIPPED and name not in kernels:
            kernels[name] = site_kernels(spec, shape, point, deployment)
    kernels[REST] = rest_kernels(shape, point, deployment)
    ms = {name: math.fsum(kernel_ms(kernel, deployment, efficiency) for kernel in run) for name, run in kernels.items()}
    device, weights, kv, tp = deployment.hardware.device, deployment.weights, deployment.kv, deployment.tp
    setting = CostSetting(device, weights, kv, tp, ANY_ENGINE)
    return tuple(point.cost(name, setting, (value, value, value), "estimate") for name, value in ms.items())


def kernel_ms(kernel: Kernel, deployment: Deployment, efficiency: Efficiency = DEFAULT) -> float:
    """Milliseconds of one kernel."""
    sheet = deployment.hardware
    overhead = sheet.kernel_us * efficiency.overhead / 1e3
    if kernel.kind == "collective":
        sending = kernel.link_bytes / (sheet.link_bytes_per_s * efficiency.link)
        return 1e3 * sending + kernel.link_steps * sheet.link_latency_us / 1e3 + overhead
    share = efficiency.attention if kernel.kind == "attention" else efficiency.matmul
    computing = kernel.flops / (sheet.matmul_flops_per_s(kernel.dtype) * share)
    reading = kernel.memory_bytes / (sheet.bandwidth_bytes_per_s * efficiency.bandwidth)
    return 1e3 * max(computing, reading) + overhead
