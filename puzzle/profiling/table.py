"""Costs as a table that answers for any workload inside the grid. Pure; reads Cost records, writes nothing.

Between measured lengths a time is piecewise linear; the time per generated token is the exact mean of that line over
all decode steps of the workload. Nothing is extrapolated: outside the grid is a MissingMeasurementError. Where whole
models were measured (profiling/correction.py), times are what those say of the sums.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from puzzle.types import Correction, CorruptFileError, Costs, CostSetting, Gap, MissingMeasurementError, Phase, Workload

REST = "rest"  # embedding, rotary tables, final norm, head: what no variant changes
ENGINE, COMPILED_ENGINE = "transformers", "transformers-compiled"  # what is measured here
ANY_ENGINE = "any"  # of estimates, which hold for every runtime
SKIPPED = ("attention.skip", "ffn.skip")
GRID_KEY: dict[Phase, str] = {"prefill": "prefill_tokens", "decode": "decode_context_tokens"}
COMMAND = "puzzle profile RUN --set profile.grid=GRID.yaml"


@dataclass(frozen=True)
class Curve:
    """Milliseconds of one shape over lengths, at one phase and batch size; ``tokens`` ascending and distinct."""

    tokens: tuple[int, ...]
    ms: tuple[float, ...]

    def covers(self, first: int, last: int) -> bool:
        return self.tokens[0] <= first and last <= self.tokens[-1]

    def at(self, tokens: int) -> float:
        """The interpolant at one length inside the curve."""
        right = bisect.bisect_left(self.tokens, tokens)
        if self.tokens[right] == tokens:
            return self.ms[right]
        left = right - 1
        share = (tokens - self.tokens[left]) / (self.tokens[right] - self.tokens[left])
        return self.ms[left] + share * (self.ms[right] - self.ms[left])

    def mean(self, first: int, last: int) -> float:
        """The mean of the interpolant over the integers ``first`` … ``last``, both included."""
        knots = [first, *(knot for knot in self.tokens if first < knot < last), last]
        if first == last:
            return self.at(first)
        # on a straight piece the sum over integers is count * (value at one end + value at the other) / 2
        pieces = [
            (right - left + 1) * (self.at(left) + self.at(right)) / 2
            for left, right in zip(knots, knots[1:], strict=False)
        ]
        counted_twice = [self.at(knot) for knot in knots[1:-1]]
        return (math.fsum(pieces) - math.fsum(counted_twice)) / (last - first + 1)


@dataclass(frozen=True)
class CostTable:
    """The costs that hold on one workload's device, dtypes, parallelism and runtime.

    ``estimated``: nobody measured some of them. ``safety``: see :class:`~puzzle.types.Costs`.
    """

    workload: Workload
    curves: Mapping[tuple[str, Phase, int], Curve] = field(repr=False)
    gaps: tuple[Gap, ...] = ()
    corrections: Mapping[Phase, Correction] = field(default_factory=dict)
    estimated: bool = False
    safety: float = 0.0

    @classmethod
    def for_workload(cls, costs: Costs, workload: Workload) -> CostTable:
        """The table of the rows that fit ``workload``.

        Raises MissingMeasurementError if none fits, CorruptFileError if a point is there twice.
        """
        asked = CostSetting(workload.device, workload.weights, workload.kv, workload.tp, workload.runtime)
        fitting = [
            cost
            for cost in costs.rows
            if replace(cost.setting, engine=asked.engine) == asked and cost.engine in (asked.engine, ANY_ENGINE)
        ]
        if not fitting:
            there = sorted({str(cost.setting) for cost in costs.rows})
            raise MissingMeasurementError(
                f"workload {workload.name}: nothing was measured on {asked}; "
                f"measured: {'; '.join(there) or 'nothing'}; "
                f"run `{COMMAND}` on that device, change the workload, or set profile.backend: roofline for estimates"
            )
        points: dict[tuple[str, Phase, int], dict[int, float]] = {}
        for cost in fitting:
            curve = points.setdefault((cost.shape_id, cost.phase, cost.batch_size), {})
            if cost.context_tokens in curve:
                raise CorruptFileError(
                    f"costs: {cost.shape_id} is there twice at {cost.phase}, batch size {cost.batch_size}, "
                    f"{cost.context_tokens} tokens; delete one of the two"
                )
            curve[cost.context_tokens] = cost.ms
        return cls(
            workload,
            {key: Curve(tuple(sorted(at)), tuple(at[n] for n in sorted(at))) for key, at in points.items()},
            costs.gaps,
            {one.phase: one for one in costs.corrections if one.setting == asked},
            any(cost.source == "estimate" for cost in fitting),
            costs.safety,
        )

    def margin(self, phases: Sequence[Phase]) -> float:
        """What a predicted time may be short of the truth, relative to it: ``safety`` standard errors.

        Of several phases the largest; 0 where no whole model was measured.
        """
        return self.safety * max(
            (self.corrections[phase].relative_error for phase in phases if phase in self.corrections), default=0.0
        )

    def prefill_ms(self, shape_id: str, batch_size: int, isl: int) -> float:
        """Milliseconds of one shape for ``batch_size`` prompts of ``isl`` tokens."""
        return self._mean(shape_id, "prefill", batch_size, isl, isl)

    def decode_ms(self, shape_id: str, batch_size: int, isl: int, osl: int) -> float:
        """Milliseconds of one shape per decode step: the mean over the osl - 1 steps that follow the prefill.

        The first of them finds ``isl`` tokens in the cache, the last isl + osl - 2. With ``osl`` 1 there is no step;
        the value is that of a step that finds ``isl``.
        """
        return self._mean(shape_id, "decode", batch_size, isl, max(isl, isl + osl - 2))

    def _mean(self, shape_id: str, phase: Phase, batch_size: int, first: int, last: int) -> float:
        if shape_id in SKIPPED:
            return 0.0
        curve = self.curves.get((shape_id, phase, batch_size))
        if curve is None or not curve.covers(first, last):
            raise MissingMeasurementError(self._missing(shape_id, phase, batch_size, first, last))
        return self._corrected(shape_id, phase, curve.mean(first, last))

    def _corrected(self, shape_id: str, phase: Phase, ms: float) -> float:
        correction = self.corrections.get(phase)
        if correction is None:
            return ms
        if shape_id == REST:
            return ms + correction.overhead_ms
        is_attention = shape_id.startswith("attention.")
        return ms * (correction.attention_factor if is_attention else correction.ffn_factor)

    def _missing(self, shape_id: str, phase: Phase, batch_size: int, first: int, last: int) -> str:
        where = f"workload {self.workload.name}: {shape_id} at {phase}"
        for gap in self.gaps:
            if (gap.phase, gap.batch_size) == (phase, batch_size) and gap.shape_id in (None, shape_id):
                return (
                    f"{where}, batch size {batch_size}, {gap.context_tokens} tokens could not be measured: {gap.reason}"
                )
        batch_sizes = sorted({size for shape, of, size in self.curves if (shape, of) == (shape_id, phase)})
        if not batch_sizes:
            advice = f"run `{COMMAND}` with {GRID_KEY[phase]} and this variant in the search space"
            return f"{where} was never measured on {self.workload.device}; {advice}"
        if batch_size not in batch_sizes:
            measured = ", ".join(map(str, batch_sizes))
            advice = f"add {batch_size} to batch_sizes in the grid file and run `{COMMAND}`"
            return f"{where}: batch size {batch_size} was not measured (measured: {measured}); {advice}"
        tokens = self.curves[shape_id, phase, batch_size].tokens
        missing = [value for value, outside in ((first, first < tokens[0]), (last, last > tokens[-1])) if outside]
        values = " and ".join(map(str, dict.fromkeys(missing)))
        return (
            f"{where}, batch size {batch_size}: {values} tokens lie outside the measured {tokens[0]} to {tokens[-1]}; "
            f"add {values} to {GRID_KEY[phase]} in the grid file and run `{COMMAND}`"
        )
