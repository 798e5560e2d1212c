"""What a distillation will come to, told from its first tenth: the loss at the end, and how far off that may be.

Reads the losses of the first steps and the schedule; writes nothing. The model is a power law in what has been learnt
so far, counted as the sum of the learning rates (as in 2408.11029; of a plain schedule, the steps):

    log loss = u - c · log(1 + S) + noise,    S = sum of the shares of the peak rate so far

A tenth of a training says little about c, so it has a prior; and near the end, where the rate falls, the loss lies off
the law by a factor that the beginning cannot know. Both were measured on the bundled teacher
(benchmarks/bench_forecast.py), on students that were no part of what judges them. The error holds all three: that of
the fit, that of c, and that of the factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle.schedule import warmup_cosine

__all__ = ["LEAST_STEPS", "Forecast", "Schedule", "forecast", "forecast_step"]

SHARE = 0.1  # of the steps, that a forecast is made from
LEAST_STEPS = 20
EXPONENT, EXPONENT_SD = 0.30, 0.10  # of the law, over students
END, END_SD = 0.0, 0.10  # log of the loss at the end over the law's, over students
LAST_SHARE = 0.05  # of the steps, that the loss at the end is a mean of


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


def forecast(losses: Sequence[float], schedule: Schedule) -> Forecast:
    """From the ``losses`` of the first steps, all of them above 0; those of the warm-up are left out.

    Least squares in logarithms with a normal prior on c.
    """
    learnt = np.log1p(schedule.learnt())
    first = min(schedule.warmup_steps, len(losses) - 2)
    x, y = learnt[first : len(losses)], np.log(np.asarray(losses[first:]))
    centre, mean = x.mean(), y.mean()
    spread = float(((x - centre) ** 2).sum())
    slope = -float(((x - centre) * (y - mean)).sum()) / spread
    residual = y - mean + slope * (x - centre)
    noise = float((residual**2).sum()) / max(1, len(y) - 2)
    weight, known = spread / max(noise, 1e-12), 1 / EXPONENT_SD**2
    exponent = (weight * slope + known * EXPONENT) / (weight + known)
    last = learnt[-max(1, round(LAST_SHARE * schedule.steps)) :].mean()
    log_end = mean - exponent * (last - centre) + END
    variance = noise / len(y) + (last - centre) ** 2 / (weight + known) + END_SD**2
    end = math.exp(log_end)
    return Forecast(end, end * math.sqrt(variance))
