"""Designs that tell all shapes apart, and regressions whose errors cover a known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from puzzle.export.nemotron_nas import check_vllm
from puzzle.profiling.regression import (
    SPARE_MODELS,
    Fit,
    Observation,
    design,
    regress,
    shape_ids,
)
from puzzle.types import Architecture, AttentionSpec, ConfigError, FfnSpec, MissingMeasurementError, ModelShape, Spec

SHAPE = ModelShape("llama", 16, 512, 8, 8, 64, 1536, 4096, 2048, tied_embeddings=False)
SPECS: tuple[Spec, ...] = (
    AttentionSpec("keep"),
    AttentionSpec("gqa", 8),  # of the same shape
    AttentionSpec("gqa", 2),
    AttentionSpec("skip"),
    FfnSpec("narrow", 768),
    FfnSpec("narrow", 256),
    FfnSpec("narrow", 256),
)
TRUTH = {
    "attention.gqa-2": 0.7,
    "attention.gqa-8": 1.1,
    "ffn.narrow-1536": 2.0,
    "ffn.narrow-256": 0.35,
    "ffn.narrow-768": 1.05,
    "rest": 3.0,
    "attention.skip": 0.0,
    "ffn.skip": 0.0,
}
MODELS = [shape_ids(model, SHAPE) for model in design(SHAPE, SPECS)]


def true_ms(model: tuple[str, ...]) -> float:
    return TRUTH["rest"] + sum(TRUTH[name] for name in model)


def observed(rng: np.random.Generator, within: float, starts: float, models: list[tuple[str, ...]]) -> Fit:
    """``within``: the noise of a measured median in ms, whose size is known; ``starts``: what differs by start."""
    times = [true_ms(model) * (1 + starts * rng.normal()) + within * rng.normal() for model in models]
    return regress([Observation(model, max(0.1, ms), within) for model, ms in zip(models, times, strict=True)])


def predicted(fit: Fit, model: tuple[str, ...]) -> tuple[float, float]:
    """Milliseconds of a whole model, the rest included, and the standard error of that sum."""
    counts = np.array([1.0 if name == "rest" else model.count(name) for name in fit.shape_ids])
    return float(counts @ fit.ms), float(counts @ np.array(fit.covariance) @ counts) ** 0.5


def test_exact_times_give_the_exact_truth() -> None:
    fit = regress([Observation(model, true_ms(model), 0.0) for model in MODELS])
    assert dict(zip(fit.shape_ids, fit.ms, strict=True)) == pytest.approx(
        {name: ms for name, ms in TRUTH.items() if not name.endswith("skip")}, rel=1e-6
    )
    assert fit.shape_ids[-1] == "rest"
    assert fit.degrees_of_freedom == SPARE_MODELS
    assert max(map(abs, fit.relative_residuals)) < 1e-6
    assert all(estimate.standard_error_ms < 1e-3 for estimate in fit.estimates)
    student = ("attention.gqa-2", "ffn.skip", "attention.skip", "ffn.narrow-768") * 8
    assert predicted(fit, student)[0] == pytest.approx(true_ms(student), rel=1e-6)


@pytest.mark.parametrize(("within", "starts"), [(0.2, 0.0), (0.02, 0.03), (0.2, 0.03)])
def test_the_errors_cover_the_truth(within: float, starts: float) -> None:
    """p10 to p90 holds the truth 80 times in 100: over shapes, whole models and draws of the noise."""
    rng = np.random.default_rng(1)
    student = ("attention.gqa-2", "ffn.skip", "attention.gqa-8", "ffn.narrow-768") * 8
    inside, covered, errors, spreads = [], [], [], []
    for _ in range(300):
        fit = observed(rng, within, starts, MODELS)
        inside += [estimate.ms_p10 <= TRUTH[estimate.shape_id] <= estimate.ms_p90 for estimate in fit.estimates]
        ms, standard_error = predicted(fit, student)
        covered.append(abs(true_ms(student) - ms) <= stats.t.ppf(0.9, fit.degrees_of_freedom) * standard_error)
        errors += [abs(estimate.ms - TRUTH[estimate.shape_id]) for estimate in fit.estimates if estimate.ms > 0]
        spreads.append(fit.start_spread)
    assert 0.7 < np.mean(inside) < 0.97
    assert 0.7 < np.mean(covered) < 0.97
    assert np.median(errors) < 0.25
    assert np.median(spreads) == pytest.approx(starts, abs=0.015)


def test_more_models_are_more_exact() -> None:
    errors = []
    for count in (9, 27):
        models = [shape_ids(model, SHAPE) for model in design(SHAPE, SPECS, num_models=count)]
        fits = [observed(np.random.default_rng(seed), 0.1, 0.0, models) for seed in range(20)]
        errors.append(np.mean([estimate.standard_error_ms for fit in fits for estimate in fit.estimates]))
    assert errors[1] < 0.75 * errors[0]


def test_as_many_models_as_unknowns_leave_the_repeats_to_tell_the_error() -> None:
    models = [shape_ids(model, SHAPE) for model in design(SHAPE, SPECS, num_models=6)]
    fit = observed(np.random.default_rng(0), 0.05, 0.0, models)
    assert (fit.degrees_of_freedom, fit.start_spread) == (0, 0.0)
    assert all(estimate.standard_error_ms > 0 for estimate in fit.estimates)


def test_every_time_is_positive_with_noise_far_above_the_smallest() -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(100):
        estimates = observed(rng, 3.0, 0.0, MODELS).estimates
        assert all(0 <= estimate.ms_p10 < estimate.ms < estimate.ms_p90 for estimate in estimates)
        lowest = min(estimates, key=lambda estimate: estimate.ms / estimate.standard_error_ms)
        assert lowest.ms >= 0.0999 * lowest.standard_error_ms
        seen += lowest.ms < 0.1001 * lowest.standard_error_ms  # on the border
    assert seen > 3


def test_designs_can_be_loaded_and_are_well_conditioned() -> None:
    models = design(SHAPE, SPECS, seed=4)
    assert len(models) == 6 + SPARE_MODELS
    assert models[0] == ((AttentionSpec("keep"), FfnSpec("keep")),) * 16
    for model in models:
        check_vllm(SHAPE, model)
        assert len(model) == 16
    names = sorted(name for name in TRUTH if not name.endswith("skip"))
    counts = np.array(
        [[1 if name == "rest" else shape_ids(model, SHAPE).count(name) for name in names] for model in models]
    )
    assert np.linalg.cond(counts / np.linalg.norm(counts, axis=0)) < 15
    assert design(SHAPE, SPECS, seed=4) == models != design(SHAPE, SPECS, seed=5)
    assert {len(model) for model in design(SHAPE, SPECS, num_layers=5)} == {5}


def test_one_layer_and_the_teacher_alone() -> None:
    shape = replace(SHAPE, num_layers=1)
    models = [shape_ids(model, shape) for model in design(shape, [])]
    times = [Observation(model, true_ms(model), 0.01) for model in models]
    with pytest.raises(MissingMeasurementError, match="do not identify attention.gqa-8 and rest"):
        regress(times)  # layer 0 must attend


def test_too_few_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 models cannot identify 6 times \(.*rest\); measure at least 6"):
        design(SHAPE, SPECS, num_models=5)


@pytest.mark.parametrize("changed", [{"windows": (None, 4) * 8}, {"family": "qwen3_moe"}])
def test_teachers_whose_layers_differ_are_refused(changed: dict[str, object]) -> None:
    experts = {"moe_layers": (1,), "num_experts": 4, "num_active_experts": 2} if "family" in changed else {}
    with pytest.raises(ConfigError, match="layers are all alike"):
        design(replace(SHAPE, **changed, **experts), SPECS)  # type: ignore[arg-type]


def models_of(*layers: Architecture) -> list[tuple[str, ...]]:
    return [shape_ids(model, SHAPE) for model in layers]


def test_shapes_that_the_models_do_not_tell_apart_are_named() -> None:
    keep = (AttentionSpec("keep"), FfnSpec("keep"))
    halved = (AttentionSpec("gqa", 2), FfnSpec("narrow", 768))
    models = models_of((keep,) * 4, (keep,) * 2, (keep, halved), (keep, halved, halved), (keep,) * 3 + (halved,))
    message = (
        r"5 measured models do not identify attention.gqa-2 and attention.gqa-8 and ffn.narrow-1536 and "
        r"ffn.narrow-768: .* measure at least 2 more"
    )
    with pytest.raises(MissingMeasurementError, match=message) as caught:
        regress([Observation(model, true_ms(model), 0.1) for model in models])
    assert caught.value.exit_code == 4


def test_a_shape_that_is_wanted_and_in_no_model_is_named() -> None:
    observations = [Observation(model, true_ms(model), 0.0) for model in MODELS]
    with pytest.raises(MissingMeasurementError, match="9 measured models do not identify ffn.narrow-512: .* 1 more"):
        regress(observations, wanted=["ffn.narrow-512", "ffn.skip"])
    with pytest.raises(MissingMeasurementError, match="no model was measured"):
        regress([], wanted=["ffn.narrow-512"])


@pytest.mark.parametrize(("ms", "error"), [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (1.0, float("inf"))])
def test_impossible_times_are_refused(ms: float, error: float) -> None:
    with pytest.raises(ValueError, match="a model took"):
        Observation(("ffn.narrow-256",), ms, error)
