"""Where a run's costs come from: measured units, here or in vLLM, a roofline, a table. Pure; writes nothing.

Whatever the source, the search is handed the same :class:`~puzzle.types.Costs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from puzzle import artifacts, yamlfiles
from puzzle.config import ProfileConfig
from puzzle.profiling import correction
from puzzle.profiling.correction import WholeModel
from puzzle.profiling.grid import GridPoint
from puzzle.profiling.hardware import Deployment, hardware
from puzzle.profiling.imported import read_table
from puzzle.profiling.roofline import DEFAULT, Efficiency, estimate, fit_efficiency
from puzzle.profiling.vllm import Engine
from puzzle.profiling.vllm_costs import MeasuredModel, costs_of, num_models
from puzzle.tables import read_costs
from puzzle.types import GIB, Cost, Costs, CostSetting, MissingMeasurementError, ModelShape, Spec, Workload

DECODE_KNOTS = 9  # contexts of a workload at which an estimate is made; between them it is nearly straight


@dataclass(frozen=True)
class CostSource:
    """Costs of ``specs`` (one per shape) for models of ``shape``, from where ``settings`` say.

    ``folder`` is the run's; ``points`` and ``made_from`` (fingerprints of what a measurement depends on) are for
    measured ones, ``workloads`` for estimates.
    """

    settings: ProfileConfig
    folder: Path
    shape: ModelShape
    specs: tuple[Spec, ...]
    points: tuple[GridPoint, ...]
    made_from: Mapping[str, str]
    workloads: tuple[Workload, ...]

    @property
    def units(self) -> tuple[Path, ...]:
        """The unit of each point of the grid, or of each whole model in vLLM; none where nothing is measured."""
        folder = self.folder / "costs"
        if self.settings.backend == "measured":
            return tuple(folder / f"{point.id}.json" for point in self.points)
        if self.settings.backend == "vllm":
            return tuple(folder / f"vllm-{number:02}.json" for number in range(num_models(self.specs, self.shape)))
        return ()

    @property
    def whole_models(self) -> tuple[Path, ...]:
        """The units of `puzzle fit-costs`: the teacher, and models drawn at random."""
        names = ["teacher", *(f"random-{number:02}" for number in range(self.settings.fit_models))]
        return tuple(self.folder / "whole-models" / f"{name}.json" for name in names)

    @property
    def fits(self) -> tuple[correction.Fit, ...]:
        """What whole models say of the sums, once all of them were measured from what the parts are measured from."""
        if self.settings.backend != "measured" or not all(path.exists() for path in self.whole_models):
            return ()
        units = [artifacts.read_unit(path) for path in self.whole_models]
        if any(unit.inputs != self.made_from for unit in units):
            return ()
        models = [unit.read(WholeModel, "model") for unit in units]
        return tuple(correction.fit(models).values())

    def _there(self) -> list[artifacts.Unit]:
        """What has been measured so far."""
        return [artifacts.read_unit(path) for path in self.units if path.exists()]

    def published(self, what: Literal["costs", "details"]) -> tuple[Cost, ...]:
        """What has been measured so far here: times of shapes, or of one norm and of the head."""
        there = [unit for unit in self._there() if what in unit.payload]
        return tuple(cost for unit in there for cost in unit.read(list[Cost], what))

    @property
    def environment(self) -> Mapping[str, str]:
        """What the last unit was measured on, and when; nothing where nothing is measured."""
        there = [unit for unit in self._there() if "environment" in unit.payload]
        return there[-1].read(dict[str, str], "environment") if there else {}

    def read(self) -> Costs:
        """MissingMeasurementError where nothing was measured, CorruptFileError for a table that cannot be used."""
        costs = self._read()
        return replace(
            costs,
            rows=with_stand_ins(costs.rows, self.settings.stand_in),
            corrections=tuple(fit.correction for fit in self.fits),
            safety=self.settings.safety,
        )

    def _read(self) -> Costs:
        if self.settings.backend == "measured":
            return read_costs(self.folder / "costs", [path.name for path in self.units])
        if self.settings.backend == "vllm":
            return self._read_vllm()
        if self.settings.backend == "imported":
            assert self.table is not None
            return self.table
        return self.estimates

    @cached_property
    def estimates(self) -> Costs:
        """At every point that some workload consists of, each once."""
        settings = [(workload, size) for workload in self.workloads for size in workload.batch_sizes]
        rows: dict[tuple[CostSetting, str, str, int, int], Cost] = {}
        for workload, size in settings:
            for point in points_of(workload, size):
                for cost in estimate(self.shape, self.specs, point, Deployment.of(workload), self.efficiency):
                    key = (cost.setting, cost.shape_id, cost.phase, cost.batch_size, cost.context_tokens)
                    rows[key] = cost
        return Costs(tuple(rows.values()))

    @property
    def engine(self) -> Engine:
        """vLLM, where that is the backend."""
        settings = self.settings.vllm
        assert settings is not None
        cache = settings.kv_cache_gib
        return Engine(
            Path(settings.python),
            "bf16" if self.settings.weights == "auto" else self.settings.weights,
            settings.tp,
            settings.max_batched_tokens,
            None if cache is None else round(cache * GIB),
        )

    def _read_vllm(self) -> Costs:
        units = self._there()
        if missing := len(self.units) - len(units):
            raise MissingMeasurementError(
                f"{missing} of {len(self.units)} models were not measured in vLLM; run `puzzle profile RUN`"
            )
        measured = [unit.read(MeasuredModel, "measured") for unit in units]
        return costs_of(self.shape, self.specs, measured, self.engine.weights, self.engine.tensor_parallel)

    @cached_property
    def table(self) -> Costs | None:
        return read_table(yamlfiles.locate("table", self.settings.table)) if self.settings.table else None

    @cached_property
    def efficiency(self) -> Efficiency:
        """What estimates reach of the data sheet: fitted to the table, on the device that most of it is of."""
        if self.table is None:
            return DEFAULT
        devices = Counter(cost.device for cost in self.table.rows)
        (device, _), *_ = devices.most_common()
        return fit_efficiency(self.table.rows, self.shape, self.specs, hardware(device)).efficiency

    @property
    def fingerprint(self) -> str:
        """Of all that the costs handed to the search depend on."""
        if self.units:
            contents = [artifacts.content_of(path) for path in self.units]
            corrected = [artifacts.content_of(path) for path in self.whole_models] if self.fits else []
            return artifacts.fingerprint([contents, corrected, self.settings.stand_in, self.settings.safety])
        costs = self.read()
        return artifacts.fingerprint([[vars(cost) for cost in costs.rows], self.settings.safety])


def points_of(workload: Workload, batch_size: int) -> tuple[GridPoint, ...]:
    """The forwards that a workload consists of: its prompt, and decode steps from its first context to its last."""
    first, last = workload.isl, max(workload.isl, workload.isl + workload.osl - 2)
    step = (last - first) / (DECODE_KNOTS - 1)
    contexts = sorted({first + round(knot * step) for knot in range(DECODE_KNOTS)})
    return (GridPoint("prefill", batch_size, first), *(GridPoint("decode", batch_size, one) for one in contexts))


def with_stand_ins(rows: Sequence[Cost], stand_in: Mapping[str, str]) -> tuple[Cost, ...]:
    """The rows, and what they stand in for: those are estimates."""
    found = list(rows)
    for asked, there in stand_in.items():
        found += [replace(cost, device=asked, source="estimate") for cost in found if cost.device == there]
    for asked, there in stand_in.items():
        found += [replace(cost, weights=asked, source="estimate") for cost in found if cost.weights == there]
    for asked, there in stand_in.items():
        found += [replace(cost, kv=asked, source="estimate") for cost in found if cost.kv == there]
    return tuple(found)
