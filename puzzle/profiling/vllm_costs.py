"""Times of single shapes from those of whole models that vLLM ran (vllm.py): one regression per point. Pure.

Reads and gives records; writes nothing. What vLLM had no memory for at a point, in any of the models, is a gap, and so
are the shapes that its reader refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puzzle.export.nemotron_nas import vllm_refusal
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.regression import SPARE_MODELS, Fit, Observation, regress, shape_ids
from puzzle.profiling.table import SKIPPED
from puzzle.profiling.vllm import ENGINE, ModelTime, PointTime
from puzzle.types import (
    Architecture,
    ConfigError,
    Cost,
    Costs,
    CostSetting,
    MissingMeasurementError,
    ModelShape,
    Spec,
    Strict,
)
from puzzle.variants import shape_id


@dataclass(frozen=True)
class MeasuredModel(Strict):
    """A model, and what vLLM took for it: what a unit holds."""

    layers: Architecture
    time: ModelTime


def loadable(specs: Iterable[Spec], shape: ModelShape) -> tuple[Spec, ...]:
    """Those that vLLM's reader takes."""
    return tuple(spec for spec in specs if vllm_refusal(spec, shape) is None)


def num_models(specs: Iterable[Spec], shape: ModelShape) -> int:
    """How many models tell the times of ``specs`` (the teacher's own among them) and of the rest, with error bars."""
    return len({shape_id(spec, shape) for spec in loadable(specs, shape)}.difference(SKIPPED)) + 1 + SPARE_MODELS


def costs_of(
    shape: ModelShape, specs: Iterable[Spec], measured: Sequence[MeasuredModel], weights: str, tensor_parallel: int
) -> Costs:
    """All that the models say of ``specs``: costs and gaps, for these ``weights`` (and KV cache) and parallelism."""
    times = [one.time for one in measured]
    fits = fit_points(shape, [one.layers for one in measured], times)
    refused = {shape_id(spec, shape): reason for spec in specs if (reason := vllm_refusal(spec, shape))}
    gaps = [found.point.gap(found.reason) for found in fits if found.reason is not None]
    gaps += [
        found.point.gap(f"vLLM cannot load it: {reason}; take it out of the space", name)
        for found in fits
        for name, reason in refused.items()
    ]
    setting = CostSetting(times[0].device, weights, weights, tensor_parallel, ENGINE)
    return Costs(tuple(costs(fits, setting)), tuple(gaps))


@dataclass(frozen=True)
class PointFit:
    """What the regression says at one point; ``fit`` None for the ``reason`` given."""

    point: GridPoint
    fit: Fit | None
    reason: str | None = None


def fit_points(shape: ModelShape, models: Sequence[Architecture], times: Sequence[ModelTime]) -> list[PointFit]:
    """One regression per point that the models were measured at. ``times``: one per model, of one engine and device.

    A point for which models are missing, so that not all shapes are identified, has none. Raises ConfigError where
    engine, device or points of the models differ.
    """
    if len({(time.version, time.device, tuple(map(_point, time.points))) for time in times}) != 1:
        raise ConfigError("vLLM: the models were measured at different points, on different devices or versions")
    names = [shape_ids(layers, shape) for layers in models]
    wanted = {name for ids in names for name in ids}
    fits = []
    for place, point in enumerate(map(_point, times[0].points)):
        measured = [(ids, time.points[place]) for ids, time in zip(names, times, strict=True)]
        reasons = [found.reason for _, found in measured if found.reason is not None]
        seen = [Observation(ids, at.ms, at.standard_error_ms) for ids, at in measured if at.reason is None]
        try:
            fits.append(PointFit(point, regress(seen, wanted)))
        except MissingMeasurementError as error:
            if not reasons:
                raise
            fits.append(PointFit(point, None, f"{reasons[0]} ({len(reasons)} of {len(times)} models: {error})"))
    return fits


def _point(time: PointTime) -> GridPoint:
    return GridPoint(time.phase, time.batch_size, time.context_tokens)


def costs(fits: Sequence[PointFit], setting: CostSetting) -> list[Cost]:
    """The records of all shapes, and of the rest, at the points that have a fit; percentiles are the estimates'."""
    return [
        found.point.cost(one.shape_id, setting, (one.ms, one.ms_p10, one.ms_p90))
        for found in fits
        if found.fit is not None
        for one in found.fit.estimates
    ]
