"""Fits the roofline's efficiency to measured costs of the same device. Pure; reads Cost records, writes nothing.

Minimises over the logarithms θ of the Efficiency's numbers::

    sum over measured costs of huber(log(estimate / measured))  +  RIDGE * number of costs * |θ - θ_start|²

from several starts, since where a kernel is bound by bandwidth, its rate has no gradient. The ridge is too weak to
matter where measurements decide, and leaves what they say nothing about (the rate, if only decode was measured) where
it was. What a runtime does between the sites is not the roofline's: the rest is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment, Hardware
from puzzle.profiling.kernels import Kernel, site_kernels
from puzzle.profiling.roofline import DEFAULT, Efficiency
from puzzle.types import Cost, MissingMeasurementError, ModelShape, Spec
from puzzle.variants import shape_id

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


def fit(
    costs: Iterable[Cost],
    shape: ModelShape,
    specs: Iterable[Spec],
    hardware: Hardware,
    start: Efficiency = DEFAULT,
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
                rows.append((number, *_ideal_ms(kernel, hardware), float(kernel.kind == "attention")))
        return cls(*np.array(rows, dtype=np.float64).T)

    def ms(self, efficiency: Efficiency) -> Array:
        """Of every cost; the sum that roofline.estimate makes."""
        share = np.where(self.is_attention > 0, efficiency.attention, efficiency.matmul)
        ms = np.maximum(self.computing_ms / share, self.reading_ms / efficiency.bandwidth)
        ms += self.sending_ms / efficiency.link + self.latency_ms + self.overhead_ms * efficiency.overhead
        return np.asarray(np.bincount(self.cost.astype(np.int64), weights=ms), dtype=np.float64)


def _ideal_ms(kernel: Kernel, hardware: Hardware) -> tuple[float, float, float, float, float]:
    """Computing, reading, sending, latency and overhead."""
    return (
        1e3 * kernel.flops / hardware.matmul_flops_per_s(kernel.dtype),
        1e3 * kernel.memory_bytes / hardware.bandwidth_bytes_per_s,
        1e3 * kernel.link_bytes / hardware.link_bytes_per_s,
        kernel.link_steps * hardware.link_latency_us / 1e3,
        hardware.kernel_us / 1e3,
    )


def _minimise(log_ratios: Callable[[Array], Array], prior: Array, begin: Array) -> tuple[Array, float]:
    """Where the penalised Huber loss is least, found from ``begin``, and its value."""
    from scipy.optimize import least_squares

    ridge = math.sqrt(RIDGE * len(log_ratios(begin)))

    def residuals(logs: Array) -> Array:
        return np.append(log_ratios(logs), ridge * (logs - prior))

    found = least_squares(residuals, begin, "3-point", loss="huber", f_scale=HUBER, ftol=1e-12, xtol=1e-12)
    return found.x, float(found.cost)
