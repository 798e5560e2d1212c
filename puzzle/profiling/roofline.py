"""Milliseconds without a measurement: a roofline over the kernels of each shape, from the hardware sheet. Pure.

Reads shapes, resolved specs and a Deployment; gives Cost records, labelled ``estimate``, that hold for any runtime.
Of each kernel (kernels.py), on one of tp GPUs::

    ms = max(FLOPs / (rate * share), bytes / (bandwidth * share)) + overhead
    collective: ms = bytes sent / (link bandwidth * share) + messages * latency + overhead

so that a kernel's reading and computing overlap, and its launch and the next kernel do not. The shares that software
reaches of the data sheet are an Efficiency: its defaults are what well-tuned kernels reach on large shapes; where
measurements exist, :func:`fit_efficiency` minimises over the logarithms θ of its numbers::

    sum over measured costs of huber(log(estimate / measured))  +  RIDGE * number of costs * |θ - θ_start|²

from several starts, since where a kernel is bound by bandwidth, its rate has no gradient. The ridge is too weak to
matter where measurements decide, and leaves what they say nothing about (the rate, if only decode was measured) where
it was. What a runtime does between the sites is not the roofline's: the rest is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment, Hardware
from puzzle.profiling.kernels import Kernel, rest_kernels, site_kernels
from puzzle.profiling.table import ANY_ENGINE, REST, SKIPPED
from puzzle.types import ConfigError, Cost, CostSetting, MissingMeasurementError, ModelShape, Spec
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
    shape: ModelShape, specs: Iterable[Spec], point: GridPoint, deployment: Deployment, efficiency: Efficiency = DEFAULT
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
    setting = CostSetting(deployment.hardware.device, deployment.weights, deployment.kv, deployment.tp, ANY_ENGINE)
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


Array = NDArray[np.float64]

NAMES = tuple(asdict(DEFAULT))  # the order of θ
COSTS_PER_NUMBER = 3
RIDGE = 1e-5
HUBER = 0.1  # log ratios beyond count linearly
SHARES_TRIED, OVERHEADS_TRIED = (1.0, 0.5, 0.2), (1.0, 5.0)  # starts, relative to the one given


@dataclass(frozen=True)
class Fit:
    """``error_before`` and ``error_after``: the median of |estimate / measured - 1| over the ``num_costs`` used."""

    efficiency: Efficiency
    num_costs: int
    error_before: float
    error_after: float


def fit_efficiency(
    costs: Iterable[Cost], shape: ModelShape, specs: Iterable[Spec], hardware: Hardware, start: Efficiency = DEFAULT
) -> Fit:
    """The efficiency that fits those of ``costs`` that were measured on ``hardware`` and are shapes of ``specs``.

    The link's share is fitted where costs of several GPUs are there. Estimates, times of 0 and other devices are
    left out. MissingMeasurementError for fewer than three costs per fitted number.
    """
    by_name = {shape_id(spec, shape): spec for spec in specs}
    used = [
        cost
        for cost in costs
        if cost.source != "estimate" and cost.device == hardware.device and cost.shape_id in by_name
    ]
    names = [name for name in NAMES if name != "link" or any(cost.tensor_parallel > 1 for cost in used)]
    needed = COSTS_PER_NUMBER * len(names)
    if len(used) < needed:
        raise MissingMeasurementError(
            f"cannot fit the roofline of {hardware.device}: {len(used)} measured costs of these shapes on it, and "
            f"{len(names)} numbers need {needed}; profile more shapes or grid points there, or use the defaults"
        )
    work = _Work.of([(cost, by_name[cost.shape_id]) for cost in used], shape, hardware)

    def log_ratios(logs: Array) -> Array:
        return np.log(work.ms(_efficiency(start, names, logs))) - np.log([cost.ms for cost in used])

    first = np.log([getattr(start, name) for name in names])
    is_overhead = np.array([name == "overhead" for name in names])
    scales = itertools.product(SHARES_TRIED, OVERHEADS_TRIED)
    starts = [first + np.log(np.where(is_overhead, overhead, share)) for share, overhead in scales]
    best = min((_minimise(log_ratios, first, begin) for begin in starts), key=lambda found: found[1])[0]
    return Fit(
        efficiency=_efficiency(start, names, best),
        num_costs=len(used),
        error_before=_median_error(log_ratios(first)),
        error_after=_median_error(log_ratios(best)),
    )


def _efficiency(start: Efficiency, names: Sequence[str], logs: Array) -> Efficiency:
    return replace(start, **{name: math.exp(value) for name, value in zip(names, logs, strict=True)})


def _median_error(log_ratios: Array) -> float:
    return float(np.median(np.abs(np.expm1(log_ratios))))


@dataclass(frozen=True)
class _Work:
    """All kernels of all costs, as arrays over kernels: at an efficiency of 1, in ms. ``cost`` numbers its cost."""

    cost: Array
    computing_ms: Array
    reading_ms: Array
    sending_ms: Array
    latency_ms: Array
    overhead_ms: Array
    is_attention: Array

    @classmethod
    def of(cls, costs: Sequence[tuple[Cost, Spec]], shape: ModelShape, hardware: Hardware) -> _Work:
        rows = []
        for number, (cost, spec) in enumerate(costs):
            deployment = Deployment(hardware, cost.weights, cost.kv, cost.tensor_parallel)
            point = GridPoint(cost.phase, cost.batch_size, cost.context_tokens)
            for kernel in site_kernels(spec, shape, point, deployment):
                computing = 1e3 * kernel.flops / hardware.matmul_flops_per_s(kernel.dtype)
                reading = 1e3 * kernel.memory_bytes / hardware.bandwidth_bytes_per_s
                sending = 1e3 * kernel.link_bytes / hardware.link_bytes_per_s
                fixed = (kernel.link_steps * hardware.link_latency_us / 1e3, hardware.kernel_us / 1e3)
                rows.append((number, computing, reading, sending, *fixed, float(kernel.kind == "attention")))
        return cls(*np.array(rows, dtype=np.float64).T)

    def ms(self, efficiency: Efficiency) -> Array:
        """Of every cost; the sum that roofline.estimate makes."""
        share = np.where(self.is_attention > 0, efficiency.attention, efficiency.matmul)
        ms = np.maximum(self.computing_ms / share, self.reading_ms / efficiency.bandwidth)
        ms += self.sending_ms / efficiency.link + self.latency_ms + self.overhead_ms * efficiency.overhead
        return np.asarray(np.bincount(self.cost.astype(np.int64), weights=ms), dtype=np.float64)


def _minimise(log_ratios: Callable[[Array], Array], prior: Array, begin: Array) -> tuple[Array, float]:
    """Where the penalised Huber loss is least, found from ``begin``, and its value."""
    from scipy.optimize import least_squares

    ridge = math.sqrt(RIDGE * len(log_ratios(begin)))

    def residuals(logs: Array) -> Array:
        return np.append(log_ratios(logs), ridge * (logs - prior))

    found = least_squares(residuals, begin, "3-point", loss="huber", f_scale=HUBER, ftol=1e-12, xtol=1e-12)
    return found.x, float(found.cost)
