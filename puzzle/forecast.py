"""What a distillation will come to, told from its first tenth: the loss at the end, and how far off that may be.

Reads the losses of the first steps and the schedule; writes nothing. The model is a power law in what has been learnt
so far, counted as the sum of the learning rates (as in 2408.11029):

    log loss = u - c · log(1 + S) + noise,    S = sum of the shares of the peak rate so far

where c is the exponent that leads from the beginning to the end. The slope of the beginning measures it badly: it is
noisy, and off by what a power law and a falling rate do not have in common. So c has a prior, and the slope counts
for as much as it is worth (:class:`Prior`, measured on the bundled teacher by benchmarks/bench_forecast.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.schedule import warmup_cosine

SHARE = 0.1  # of the steps, that a forecast is made from
LEAST_STEPS = 20
LAST_SHARE = 0.05  # of the steps, that the loss at the end is a mean of


@dataclass(frozen=True)
class Prior:
    """Over students: the exponent from the beginning to the end, and what the slope of the beginning lacks to it."""

    exponent: float
    exponent_sd: float
    lag: float
    lag_sd: float


PRIOR = Prior(0.32, 0.10, 0.13, 0.10)


@dataclass(frozen=True)
class Schedule:
    """``floor``: the last rate over the highest."""

    steps: int
    warmup_steps: int
    floor: float

    def learnt(self) -> np.ndarray:
        """(steps,) S after each step."""
        rates = [warmup_cosine(step, self.steps, self.warmup_steps, self.floor) for step in range(self.steps)]
        return np.cumsum(rates)


@dataclass(frozen=True)
class Forecast:
    """The loss at the end, a mean over the last steps, and its standard error."""

    mean: float
    standard_error: float


def forecast_step(schedule: Schedule) -> int | None:
    """After which step a forecast is made; None where the training is too short for one."""
    step = max(math.ceil(SHARE * schedule.steps), 2 * schedule.warmup_steps, LEAST_STEPS)
    return step if step <= schedule.steps / 2 else None


@dataclass(frozen=True)
class Beginning:
    """The line through log losses after the warm-up: its height at its centre, its slope, their errors squared.

    ``reach``: from the centre to the end, in log(1 + S).
    """

    mean: float
    slope: float
    mean_variance: float
    slope_variance: float
    reach: float

    @classmethod
    def of(cls, losses: Sequence[float], schedule: Schedule) -> Beginning:
        learnt = np.log1p(schedule.learnt())
        first = min(schedule.warmup_steps, len(losses) - 3)
        x, y = learnt[first : len(losses)], np.log(np.asarray(losses[first:]))
        centre, mean = x.mean(), y.mean()
        spread = ((x - centre) ** 2).sum()
        slope = ((x - centre) * (y - mean)).sum() / spread
        noise = ((y - mean - slope * (x - centre)) ** 2).sum() / (len(y) - 2)
        reach = learnt[-num_last(schedule) :].mean() - centre
        return cls(*map(float, (mean, slope, noise / len(y), noise / spread, reach)))


def num_last(schedule: Schedule) -> int:
    """How many steps the loss at the end is a mean of."""
    return max(1, round(LAST_SHARE * schedule.steps))


def forecast(losses: Sequence[float], schedule: Schedule, prior: Prior = PRIOR) -> Forecast:
    """From the ``losses`` of the first steps, all of them above 0; those of the warm-up are left out."""
    begun = Beginning.of(losses, schedule)
    known, seen = 1 / prior.exponent_sd**2, 1 / (begun.slope_variance + prior.lag_sd**2)
    exponent = (known * prior.exponent + seen * (prior.lag - begun.slope)) / (known + seen)
    end = math.exp(begun.mean - exponent * begun.reach)
    return Forecast(end, end * math.sqrt(begun.mean_variance + begun.reach**2 / (known + seen)))
