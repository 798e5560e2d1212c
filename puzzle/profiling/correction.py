"""What whole models say of sums of parts: a small correction and its error. Pure; reads records, writes nothing.

Per phase, over all measured models and points, by least squares on the relative error::

    whole = rest + overhead + attention_factor * sum(attention) + ffn_factor * sum(ffn)

Nothing, the overhead alone, or all three are fitted: what predicts best the models that were left out of the fit. So a
correction is never worse than none, on models that it has not seen. Times from a busy machine can ask for factors that
are not positive; those are never taken.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.types import ConfigError, Correction, CostSetting, Item, ModelShape, Phase, Site, Spec, Strict
from puzzle.variants import is_fused, keep_spec

PRIOR = 0.1  # standard deviation that a factor is expected to have around 1, and the overhead around 0 of the whole
NOISE = 0.01  # relative, of a measured whole
LEAST_MODELS = 4
FITTED = {"none": (), "overhead": (0,), "all": (0, 1, 2)}  # columns: overhead, attention, ffn


@dataclass(frozen=True)
class WholePoint(Strict):
    """One whole model at one point of the grid, and the sums of its parts, measured in the same rounds."""

    phase: Phase
    batch_size: int
    context_tokens: int
    whole_ms: float
    rest_ms: float
    attention_ms: float
    ffn_ms: float

    @property
    def parts_ms(self) -> float:
        return self.rest_ms + self.attention_ms + self.ffn_ms


@dataclass(frozen=True)
class WholeModel(Strict):
    """A whole model that was measured end to end."""

    name: str
    setting: CostSetting
    points: tuple[WholePoint, ...]


def whole_models(shape: ModelShape, items: Sequence[Item], count: int) -> dict[str, tuple[Spec, ...]]:
    """What to measure, as specs in the order of the sites: the teacher, and ``count`` models drawn at random.

    Every other one keeps about half of the teacher's blocks, so that mild and severe cuts are both there.
    """
    on_offer: dict[Site, list[Spec]] = {site: [keep_spec(shape, site)] for site in shape.sites}
    for item in items:
        for site, spec in item.at.items():
            # fused ones at random places could outgrow the teacher
            if spec not in on_offer[site] and not is_fused(item):
                on_offer[site].append(spec)
    models = {"teacher": tuple(specs[0] for specs in on_offer.values())}
    for number in range(count):
        rng = random.Random(number)
        mild = number % 2 == 0
        models[f"random-{number:02}"] = tuple(
            specs[0] if mild and rng.random() < 0.5 else rng.choice(specs) for specs in on_offer.values()
        )
    return models


@dataclass(frozen=True)
class Fit:
    """A correction, and the relative errors of each (model, point) by the plain sum and left out of the fit."""

    correction: Correction
    fitted: str
    before: tuple[float, ...]
    after: tuple[float, ...]


def fit_phase(models: Sequence[WholeModel], phase: Phase) -> Fit:
    """The correction of one phase. ConfigError where too few models were measured, or on several settings."""
    settings = {model.setting for model in models}
    if len(models) < LEAST_MODELS or len(settings) != 1:
        raise ConfigError(f"{len(models)} whole models in {len(settings)} settings; at least {LEAST_MODELS} in one")
    points = {model.name: [point for point in model.points if point.phase == phase] for model in models}
    left_out = {what: _left_out(points, columns) for what, columns in FITTED.items()}
    everything = [point for of in points.values() for point in of]
    solved = {what: _solve(everything, columns) for what, columns in FITTED.items()}
    possible = [what for what, (_, *factors) in solved.items() if min(factors) > 0]
    fitted = min(possible, key=lambda what: _rms(left_out[what]))
    overhead, attention, ffn = solved[fitted]
    correction = Correction(settings.pop(), phase, overhead, attention, ffn, _rms(left_out[fitted]))
    return Fit(correction, fitted, tuple(left_out["none"]), tuple(left_out[fitted]))


def fit(models: Sequence[WholeModel]) -> Mapping[Phase, Fit]:
    """By phase, of those that were measured."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return {
        phase: fit_phase(models, phase)
        for phase in phases
        if any(point.phase == phase for model in models for point in model.points)
    }


def _left_out(points: Mapping[str, Sequence[WholePoint]], columns: Sequence[int]) -> list[float]:
    """Relative errors, signed, each model predicted by a fit to the others."""
    errors = []
    for name, own in points.items():
        others = [point for other, of in points.items() if other != name for point in of]
        overhead, attention, ffn = _solve(others, columns)
        for point in own:
            predicted = point.rest_ms + overhead + attention * point.attention_ms + ffn * point.ffn_ms
            errors.append(predicted / point.whole_ms - 1)
    return errors


def _solve(points: Sequence[WholePoint], columns: Sequence[int]) -> tuple[float, float, float]:
    """Overhead in milliseconds and the two factors; of those not in ``columns`` 0 and 1."""
    solution = np.array([0.0, 1.0, 1.0])
    if columns and points:
        wholes = np.array([point.whole_ms for point in points])
        parts = np.array([[1.0, point.attention_ms, point.ffn_ms] for point in points])
        residual = (wholes - np.array([point.parts_ms for point in points])) / wholes
        scale = np.array([float(np.median(wholes)), 1.0, 1.0])  # the overhead in units of a typical whole
        design = (parts / wholes[:, None] * scale)[:, list(columns)]
        weights = np.eye(len(columns)) * (NOISE / PRIOR) ** 2
        change = np.linalg.solve(design.T @ design + weights, design.T @ residual)
        solution[list(columns)] += change * scale[list(columns)]
    overhead, attention, ffn = solution.tolist()
    return overhead, attention, ffn


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors))
