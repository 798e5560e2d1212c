"""Forecasts: exact on a power law, honest about their error on curves of the kind that they are made for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from puzzle import forecast as module
from puzzle.forecast import Forecast, Schedule, forecast, forecast_step

SCHEDULE = Schedule(2000, 40, 0.1)


def curve(exponent: float, start: float = 2.0, noise: float = 0.0, seed: int = 0, end: float = 0.0) -> np.ndarray:
    """``end``: logarithm of the factor by which the end lies off the law."""
    learnt = np.log1p(SCHEDULE.learnt())
    off = end * np.linspace(0, 1, SCHEDULE.steps) ** 4
    return np.exp(
        math.log(start) - exponent * learnt + off + noise * np.random.default_rng(seed).normal(size=len(learnt))
    )


def told(losses: np.ndarray) -> tuple[Forecast, float]:
    """The forecast from the beginning, and what the last steps came to."""
    step = forecast_step(SCHEDULE)
    return forecast(losses[:step].tolist(), SCHEDULE), float(losses[-100:].mean())


@pytest.mark.parametrize("exponent", [0.05, 0.3, 0.7])
def test_a_power_law_without_noise_is_known_to_its_end(exponent: float) -> None:
    found, true = told(curve(exponent))
    assert found.mean == pytest.approx(true * math.exp(module.END), rel=1e-3)
    assert found.standard_error == pytest.approx(found.mean * module.END_SD, rel=1e-3)


def test_the_error_is_what_it_says() -> None:
    """Over curves drawn as the priors say."""
    rng = np.random.default_rng(1)
    off = []
    for seed in range(300):
        exponent = rng.normal(module.EXPONENT, module.EXPONENT_SD)
        end = rng.normal(module.END, module.END_SD)
        found, true = told(curve(exponent, noise=0.2, seed=seed, end=end))
        off.append((math.log(found.mean) - math.log(true)) / (found.standard_error / found.mean))
    assert np.std(off) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(off)) < 0.35


def test_more_noise_and_a_shorter_beginning_are_less_sure() -> None:
    calm, noisy = (forecast(curve(0.3, noise=noise)[:200].tolist(), SCHEDULE) for noise in (0.02, 0.3))
    short = forecast(curve(0.3, noise=0.3)[:60].tolist(), SCHEDULE)
    assert calm.standard_error < noisy.standard_error < short.standard_error


@pytest.mark.parametrize(
    ("steps", "warmup", "step"),
    [(2000, 40, 200), (400, 40, 80), (192, 40, 80), (100, 40, None), (30, 1, None), (45, 1, 20)],
)
def test_a_forecast_waits_for_a_tenth_and_for_the_warm_up(steps: int, warmup: int, step: int | None) -> None:
    assert forecast_step(Schedule(steps, warmup, 0.1)) == step
