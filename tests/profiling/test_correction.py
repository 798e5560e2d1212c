"""What whole models say of sums: known corrections are found, and none is made where none helps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from puzzle.config import FusionFile
from puzzle.profiling.correction import WholeModel, WholePoint, fit, fit_phase, whole_models
from puzzle.space import SearchSpace
from puzzle.types import ConfigError, CostSetting, ModelShape

SETTING = CostSetting("cpu", "fp32", "fp32", 1, "transformers")


def make_models(
    overhead: float, attention: float, ffn: float, noise: float = 0.0, count: int = 7, seed: int = 0
) -> list[WholeModel]:
    rng = random.Random(seed)
    models = []
    for number in range(count):
        points = []
        for phase, scale in (("prefill", 30.0), ("decode", 10.0)):
            parts = {"attention_ms": scale * rng.uniform(0.2, 1), "ffn_ms": scale * rng.uniform(0.2, 1), "rest_ms": 2.0}
            whole = 2.0 + overhead + attention * parts["attention_ms"] + ffn * parts["ffn_ms"]
            whole *= 1 + rng.gauss(0, noise)
            points.append(WholePoint(phase, 1, 64, whole, **parts))  # type: ignore[arg-type]
        models.append(WholeModel(f"model-{number}", SETTING, tuple(points)))
    return models


def test_a_known_correction_is_found_and_lowers_the_error_of_models_left_out() -> None:
    found = fit_phase(make_models(0.5, 1.1, 0.9, noise=0.002, count=12), "decode")
    assert found.fitted == "all"
    assert found.correction.attention_factor == pytest.approx(1.1, abs=0.05)
    assert found.correction.ffn_factor == pytest.approx(0.9, abs=0.05)
    assert found.correction.relative_error < 0.02
    assert max(map(abs, found.after)) < 0.3 * max(map(abs, found.before))
    assert set(fit(make_models(0.5, 1.1, 0.9))) == {"prefill", "decode"}


def test_an_overhead_alone_is_found_as_such() -> None:
    found = fit_phase(make_models(1.5, 1.0, 1.0, noise=0.002, count=12), "decode")
    assert found.correction.overhead_ms == pytest.approx(1.5, rel=0.1)
    assert found.correction.attention_factor == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_noise_is_left_alone(seed: int) -> None:
    """The error of models left out is never worse than the plain sum's, and says how large the noise is."""
    found = fit_phase(make_models(0.0, 1.0, 1.0, noise=0.05, seed=seed), "prefill")
    assert sum(error**2 for error in found.after) <= sum(error**2 for error in found.before)
    assert 0.01 < found.correction.relative_error < 0.15


def test_an_error_is_told_as_large_as_it_is() -> None:
    """Sums that are far off in no regular way leave an error above 1, not a smaller figure in its place."""
    models = make_models(0.0, 1.0, 1.0)
    strange = [
        replace(model, points=tuple(replace(point, whole_ms=point.whole_ms * factor) for point in model.points))
        for model, factor in zip(models, (0.05, 9.0, 0.1, 7.0, 0.05, 8.0, 0.1), strict=True)
    ]
    assert fit_phase(strange, "decode").correction.relative_error > 1


def test_factors_that_are_not_positive_are_never_taken() -> None:
    """Wholes that fall where attention grows, as a busy machine may time them: all three fitted predict best."""
    found = fit_phase(make_models(14.0, -1.0, 1.0), "decode")
    assert found.fitted != "all"
    assert found.correction.attention_factor > 0


def test_too_few_models_or_several_devices_are_refused() -> None:
    models = make_models(0.1, 1, 1)
    with pytest.raises(ConfigError, match="3 whole models in 1 settings; at least 4"):
        fit_phase(models[:3], "decode")
    stranger = WholeModel("stranger", CostSetting("h100", "bf16", "bf16", 1, "transformers"), models[0].points)
    with pytest.raises(ConfigError, match="in 2 settings"):
        fit_phase([*models, stranger], "decode")


def test_the_models_to_measure_are_the_teacher_and_different_ones_that_stay_the_same() -> None:
    shape = ModelShape("llama", 6, 24, 4, 4, 8, 40, 96, 64, tied_embeddings=False)
    space = SearchSpace.parse({"attention": ["keep", "gqa-2", "skip"], "ffn": ["keep", "narrow-16", "linear"]}, shape)
    models = whole_models(shape, space.items(), 6)
    assert list(models) == ["teacher", *(f"random-{number:02}" for number in range(6))]
    assert all(spec.kind == "keep" for spec in models["teacher"])
    assert len(set(models.values())) == 7
    assert models == whole_models(shape, space.items(), 6)
    assert {spec for specs in models.values() for spec in specs} == {
        spec for item in space.items() for spec in item.specs
    }


def test_whole_models_are_no_larger_than_their_layers(shape: ModelShape) -> None:
    """Fused FFNs at random places would add up to more than the teacher."""
    fusion = FusionFile(max_layers=2)
    space = SearchSpace.parse({"attention": ("skip",), "ffn": ("skip",)}, shape, fusion=fusion)
    models = whole_models(shape, space.items(), 8)
    assert space.fused and {spec.kind for specs in models.values() for spec in specs} == {"keep", "skip"}
