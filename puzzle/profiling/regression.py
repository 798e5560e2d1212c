r"""Milliseconds of single shapes from the times of whole models: which models to measure, and what they say.

Reads specs (:func:`design`) and times of whole models at one point of the grid (:func:`regress`); computes one time per
shape, and of the rest; writes nothing. Pure. For engines that only run whole models. With n_s the number of sites of
shape s in a model, and rest what a forward takes without its sites,

    time = rest + sum over s of n_s * time_s + error.

Every model holds many shapes in different numbers, as in a weighing design, so each measurement says something of every
shape; there must be at least as many models as unknowns, and more for error bars. A skipped part takes no time by
definition, and there is no unknown per layer: a layer without parts is empty in an engine, so what each layer costs
beyond its kernels is its parts'. Skips are also what sets the rest apart from the sites: with none, all models would
have as many sites.

Two things make a time differ from the sum: noise within a model, whose standard error s_i its repeats tell, and what
differs from start to start of the engine (and where the sum is wrong), in proportion t to the time. Weights are
1 / (s_i^2 + t^2 time_i^2), with t such that the weighted squares of the residuals sum to the degrees of freedom
(Paule and Mandel 1982), or 0 where the repeats explain all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puzzle.profiling.table import REST, SKIPPED
from puzzle.types import Architecture, AttentionSpec, ConfigError, FfnSpec, MissingMeasurementError, ModelShape, Spec
from puzzle.variants import shape_id

Matrix = NDArray[np.float64]
SPARE_MODELS = 3  # beyond one per unknown: degrees of freedom for the error bars
NUM_CANDIDATES = 400
EXCHANGE_PASSES = 8
CONCENTRATION = 0.5  # of the Dirichlet distribution of shares: below 1, models made of few shapes are common
LEAST = 0.1  # standard errors that every time is at least
IDENTIFIED = 1e-8  # singular values below this part of the largest are zero


@dataclass(frozen=True)
class Observation:
    """One whole model at one point: a shape_id per site (skips may be left out), and the time of a forward."""

    shape_ids: tuple[str, ...]
    ms: float
    standard_error_ms: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ms) and self.ms > 0 and 0 <= self.standard_error_ms < math.inf):
            raise ValueError(f"a model took {self.ms} ms with standard error {self.standard_error_ms}")


@dataclass(frozen=True)
class Estimate:
    """One time, its standard error, and the percentiles of where it may lie (Student's t)."""

    shape_id: str
    ms: float
    standard_error_ms: float
    ms_p10: float
    ms_p90: float


@dataclass(frozen=True)
class Fit:
    """Times of all shapes, and of the rest, which comes last. ``covariance`` (ms^2) is in the same order.

    ``start_spread`` is t above, ``relative_residuals`` (fitted / measured - 1) are in the models' order.
    ``degrees_of_freedom`` 0: the errors know of the noise within a model only.
    """

    shape_ids: tuple[str, ...]
    ms: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    start_spread: float
    degrees_of_freedom: int
    relative_residuals: tuple[float, ...]

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        from scipy.special import stdtrit

        # Student's t at 90 %; of the normal distribution, whose degrees of freedom are infinite, where there are none
        quantile = float(stdtrit(self.degrees_of_freedom or math.inf, 0.9))
        errors = [math.sqrt(row[number]) for number, row in enumerate(self.covariance)]
        return tuple(
            Estimate(name, ms, error, max(0.0, ms - quantile * error), ms + quantile * error)
            for name, ms, error in zip(self.shape_ids, self.ms, errors, strict=True)
        )


def shape_ids(layers: Architecture, shape: ModelShape) -> tuple[str, ...]:
    """One per site, skips included, in the order of the sites."""
    return tuple(shape_id(spec, shape) for specs in layers for spec in specs)


def design(
    shape: ModelShape,
    specs: Iterable[Spec],
    num_models: int | None = None,
    num_layers: int | None = None,
    seed: int = 0,
) -> tuple[Architecture, ...]:
    """Models whose times identify every distinct shape among ``specs`` (resolved; keep and skip are always there).

    The first is the teacher; all have ``num_layers`` (default: the teacher's; fewer take less memory, but predicting a
    whole then multiplies the errors) and attention in layer 0, without which engines do not start. The others are drawn
    at random and exchanged while that lowers the mean variance of the predicted times of random architectures.
    ``num_models``: default one per unknown and SPARE_MODELS.

    Raises ConfigError for fewer models than unknowns, and for teachers whose layers differ from one another.
    """
    if shape.moe_layers or len(set(shape.windows)) > 1:
        raise ConfigError("whole models can be designed only for teachers whose layers are all alike")
    palette = _Palette.of(shape, specs)
    count = num_models or len(palette.unknowns) + SPARE_MODELS
    if count < len(palette.unknowns):
        raise ConfigError(
            f"{count} models cannot identify {len(palette.unknowns)} times ({', '.join(palette.unknowns)}); "
            f"measure at least {len(palette.unknowns)}, or take variants out of the space"
        )
    rng = np.random.default_rng(seed)
    depth = num_layers or shape.num_layers
    teacher = ((palette.attention[0], palette.ffn[0]),) * depth
    candidates = [teacher, *(palette.draw(rng, depth) for _ in range(NUM_CANDIDATES))]
    counts = _counts([shape_ids(model, shape) for model in candidates], palette.unknowns)
    uniform = [palette.draw(rng, depth, concentration=math.inf) for _ in range(NUM_CANDIDATES)]
    target = _counts([shape_ids(model, shape) for model in uniform], palette.unknowns)
    return tuple(candidates[number] for number in _exchange(counts, target.T @ target / len(target), count))


@dataclass(frozen=True)
class _Palette:
    """Distinct specs by part, the teacher's own first, and the names of the unknowns, the rest last."""

    attention: tuple[AttentionSpec, ...]
    ffn: tuple[FfnSpec, ...]
    unknowns: tuple[str, ...]

    @classmethod
    def of(cls, shape: ModelShape, specs: Iterable[Spec]) -> _Palette:
        window = shape.window(0)
        given = (AttentionSpec("keep", window_tokens=window), FfnSpec("keep"), *specs)
        distinct: dict[str, Spec] = {}
        for spec in given:
            distinct.setdefault(shape_id(spec, shape), spec)
        for name in SKIPPED:
            distinct.pop(name, None)
        attention = tuple(spec for spec in distinct.values() if isinstance(spec, AttentionSpec))
        ffn = tuple(spec for spec in distinct.values() if isinstance(spec, FfnSpec))
        return cls(attention, ffn, (*distinct, REST))

    def draw(self, rng: np.random.Generator, depth: int, concentration: float = CONCENTRATION) -> Architecture:
        """Layers with random shares of each spec and of skips; infinite ``concentration``: equal chances."""
        attention = [*self.attention, AttentionSpec("skip")]
        ffn = [*self.ffn, FfnSpec("skip")]
        first = _draw_numbers(rng, len(attention), depth, concentration)
        second = _draw_numbers(rng, len(ffn), depth, concentration)
        attends = next((place for place, number in enumerate(first) if number < len(self.attention)), None)
        if attends is None:
            first[0] = int(rng.integers(len(self.attention)))
        else:
            first[0], first[attends] = first[attends], first[0]
        return tuple((attention[one], ffn[other]) for one, other in zip(first, second, strict=True))


def _draw_numbers(rng: np.random.Generator, kinds: int, depth: int, concentration: float) -> list[int]:
    even = math.isinf(concentration)
    shares = np.full(kinds, 1 / kinds) if even else rng.dirichlet([concentration] * kinds)
    return [int(number) for number in rng.choice(kinds, size=depth, p=shares)]


def _counts(models: Sequence[Sequence[str]], unknowns: Sequence[str]) -> Matrix:
    """(models, unknowns): how often each shape occurs; 1 for the rest."""
    tallies = [Counter(names) for names in models]
    return np.array([[1 if name == REST else tally[name] for name in unknowns] for tally in tallies], dtype=float)


def _exchange(counts: Matrix, target: Matrix, num_models: int) -> list[int]:
    """Rows of ``counts`` with a low trace of (X'X)^-1 target: the first, and others found greedily and exchanged."""
    squares = counts[:, :, None] * counts[:, None, :]
    ridge = 1e-6 * np.eye(counts.shape[1])

    def best(others: Sequence[int]) -> tuple[int, float]:
        """The row that goes best with the ``others``, and what they come to together."""
        variance = np.trace(
            np.linalg.inv(squares[list(others)].sum(axis=0) + squares + ridge) @ target, axis1=1, axis2=2
        )
        row = int(np.argmin(variance))
        return row, float(variance[row])

    chosen, reached = [0], math.inf
    while len(chosen) < num_models:
        row, reached = best(chosen)
        chosen.append(row)
    for _ in range(EXCHANGE_PASSES):
        before = reached
        for place in range(1, num_models):
            row, variance = best(chosen[:place] + chosen[place + 1 :])
            if variance < reached:
                chosen[place], reached = row, variance
        if reached >= before * (1 - 1e-3):
            break
    return chosen


def regress(observations: Sequence[Observation], wanted: Iterable[str] = ()) -> Fit:
    """The times of all shapes that occur or are ``wanted``; the covariance is that of the unrestricted fit.

    Times are positive: none is below a tenth of its standard error, which is as good as zero.

    Raises MissingMeasurementError, naming the shapes, where the models do not tell them apart.
    """
    from scipy.optimize import nnls

    if not observations:
        raise MissingMeasurementError("no model was measured")
    names = sorted({*wanted, *(name for model in observations for name in model.shape_ids)} - {*SKIPPED, REST})
    unknowns = (*names, REST)
    counts = _counts([model.shape_ids for model in observations], unknowns)
    _check_identified(counts, unknowns)
    times = np.array([model.ms for model in observations])
    own = np.array([model.standard_error_ms for model in observations])
    freedom = len(times) - len(unknowns)
    floor = 1e-6 * times  # a clock that always reads the same still is no exact one
    spread = _start_spread(counts, times, np.hypot(own, floor), freedom)
    deviation = np.sqrt(own**2 + floor**2 + (spread * times) ** 2)
    scaled, goal = counts / deviation[:, None], times / deviation
    covariance = np.linalg.inv(scaled.T @ scaled)
    least = LEAST * np.sqrt(np.diag(covariance))
    ms = least + nnls(scaled, goal - scaled @ least)[0]
    residuals = counts @ ms / times - 1
    rows = tuple(tuple(map(float, row)) for row in covariance)
    return Fit(unknowns, tuple(map(float, ms)), rows, spread, freedom, tuple(map(float, residuals)))


def _check_identified(counts: Matrix, unknowns: Sequence[str]) -> None:
    lengths = np.linalg.norm(counts, axis=0)
    _, values, directions = np.linalg.svd(counts / np.where(lengths > 0, lengths, 1.0), full_matrices=True)
    rank = int((values > IDENTIFIED * values[0]).sum())
    loose = np.abs(directions[rank:]).max(axis=0, initial=0.0) > math.sqrt(IDENTIFIED)
    if loose.any():
        affected = [name for name, is_loose in zip(unknowns, loose, strict=True) if is_loose]
        raise MissingMeasurementError(
            f"{len(counts)} measured models do not identify {' and '.join(affected)}: their numbers vary too "
            f"little, or only together; measure at least {len(unknowns) - rank} more, in which they differ"
        )


def _start_spread(counts: Matrix, times: Matrix, own: Matrix, freedom: int) -> float:
    """t of the module's docstring; 0 without degrees of freedom."""
    from scipy.optimize import brentq

    def excess(spread: float) -> float:
        deviation = np.sqrt(own**2 + (spread * times) ** 2)
        scaled, goal = counts / deviation[:, None], times / deviation
        residual = goal - scaled @ np.linalg.lstsq(scaled, goal, rcond=None)[0]
        return float(residual @ residual) - freedom

    if freedom == 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-15))
