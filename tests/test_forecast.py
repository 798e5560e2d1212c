"""Forecasts: exact on a power law, honest about their error on curves of the kind that they are made for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from puzzle.forecast import Forecast, Prior, Schedule, forecast, forecast_step, num_last

SCHEDULE = Schedule(2000, 40, 0.1)


def curve(exponent: float, slope: float | None = None, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A power law whose beginning may have another slope than what leads to the end."""
    learnt = np.log1p(SCHEDULE.learnt())
    first = forecast_step(SCHEDULE) or 0
    centre = learnt[40:first].mean()
    law = -exponent * (learnt - centre)
    law[:first] = -(exponent if slope is None else slope) * (learnt[:first] - centre)
    return np.exp(law + noise * np.random.default_rng(seed).normal(size=len(learnt)))


def told(losses: np.ndarray, prior: Prior) -> tuple[Forecast, float]:
    """The forecast from the beginning, and what the last steps came to."""
    found = forecast(losses[: forecast_step(SCHEDULE)].tolist(), SCHEDULE, prior)
    return found, float(losses[-num_last(SCHEDULE) :].mean())


@pytest.mark.parametrize("exponent", [0.05, 0.3, 0.7])
def test_a_power_law_is_known_to_its_end_where_the_slope_is_believed(exponent: float) -> None:
    found, true = told(curve(exponent), Prior(0.3, 10.0, 0.0, 1e-3))
    assert found.mean == pytest.approx(true, rel=1e-3)
    assert found.standard_error < 0.01 * true
    assert told(curve(0.3, slope=exponent), Prior(0.3, 1e-3, 0.0, 10.0))[0].mean == pytest.approx(
        told(curve(0.3), Prior(0.3, 1e-3, 0.0, 10.0))[1], rel=1e-2
    )


def test_the_error_is_what_it_says() -> None:
    """Over curves drawn as the prior says."""
    rng, prior, off = np.random.default_rng(1), Prior(0.4, 0.08, 0.1, 0.15), []
    for seed in range(300):
        exponent = rng.normal(prior.exponent, prior.exponent_sd)
        slope = exponent - rng.normal(prior.lag, prior.lag_sd)
        found, true = told(curve(exponent, slope, noise=0.2, seed=seed), prior)
        off.append((math.log(found.mean) - math.log(true)) / (found.standard_error / found.mean))
    assert np.std(off) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(off)) < 0.35


def share(found: Forecast) -> float:
    return found.standard_error / found.mean


def test_more_noise_and_a_shorter_beginning_are_less_sure() -> None:
    calm, noisy = (forecast(curve(0.3, noise=noise)[:200].tolist(), SCHEDULE) for noise in (0.02, 0.5))
    short = forecast(curve(0.3, noise=0.5)[:60].tolist(), SCHEDULE)
    assert share(calm) < share(noisy) < share(short)


@pytest.mark.parametrize(
    ("steps", "warmup", "step"),
    [(2000, 40, 200), (400, 40, 80), (192, 40, 80), (100, 40, None), (30, 1, None), (45, 1, 20)],
)
def test_a_forecast_waits_for_a_tenth_and_for_the_warm_up(steps: int, warmup: int, step: int | None) -> None:
    assert forecast_step(Schedule(steps, warmup, 0.1)) == step
