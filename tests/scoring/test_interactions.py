"""Models of interactions on synthetic teachers whose law is known: what is found, how sure it is, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from puzzle.scoring.design import Floats, Single, singles
from puzzle.scoring.interactions import (
    ADDITIVE,
    KINDS,
    LEAST_RATIO,
    Evaluation,
    Fit,
    InteractionModel,
    best_of,
    cross_validated,
    spearman,
)
from puzzle.types import (
    AttentionSpec,
    ConfigError,
    CorruptFileError,
    FfnSpec,
    MissingMeasurementError,
    Site,
    from_json,
    to_json,
)
from puzzle.variants import layer_item, site_item

NUM_LAYERS = 5
SITES = [Site(layer, part) for layer in range(NUM_LAYERS) for part in ("attention", "ffn")]
VARIANTS: dict[str, list[AttentionSpec] | list[FfnSpec]] = {
    "attention": [AttentionSpec("gqa", num_kv_heads=1), AttentionSpec("linear"), AttentionSpec("skip")],
    "ffn": [FfnSpec("narrow", intermediate_size=8), FfnSpec("linear"), FfnSpec("skip")],
}
ITEMS = [site_item(site, spec) for site in SITES for spec in VARIANTS[site.part]]
Law = Callable[[Floats, Floats], float]  # of an architecture's scores and the rho among them


@dataclass(frozen=True)
class World:
    """Scores drawn once, a rho for every two sites, and a law that makes a KL of both."""

    scores: dict[str, float]
    rho: Floats
    law: Law

    @property
    def singles(self) -> tuple[Single, ...]:
        return singles(ITEMS, self.scores)

    def evaluations(self, count: int, noise: float, seed: int = 0) -> list[Evaluation]:
        """Random architectures that change most sites, measured with this relative error."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(count):
            sites = np.flatnonzero(rng.random(len(SITES)) < 0.7)
            sites = sites if len(sites) > 1 else np.arange(2)
            items = [ITEMS[3 * site + rng.integers(3)].id for site in sites]
            kl = self.law(np.array([self.scores[item_id] for item_id in items]), self.rho[np.ix_(sites, sites)])
            found.append(Evaluation(tuple(items), float(kl * np.exp(noise * rng.normal())), noise * kl))
        return found


def pairwise(scores: Floats, rho: Floats) -> float:
    amplitudes = np.sqrt(scores)
    return float(scores.sum() + amplitudes @ rho @ amplitudes)  # rho is zero on the diagonal


def additive(scores: Floats, rho: Floats) -> float:
    return float(scores.sum())


def saturating(scores: Floats, rho: Floats) -> float:
    coupling = 1 - np.square(scores).sum() / scores.sum() ** 2
    return float(scores.sum() * np.exp(coupling * (0.1 - 0.3 * np.log(scores.sum()))))


def world(law: Law, rho_of: Callable[[int, int, np.random.Generator], float] | None = None) -> World:
    rng = np.random.default_rng(11)
    rho = np.zeros((len(SITES), len(SITES)))
    for first in range(len(SITES)):
        for second in range(first + 1, len(SITES)):
            value = rng.normal(0.05, 0.12) if rho_of is None else rho_of(first, second, rng)
            rho[first, second] = rho[second, first] = value
    return World({item.id: float(np.exp(rng.normal(-3, 0.8))) for item in ITEMS}, rho, law)


def fits_of(where: World, evaluations: Sequence[Evaluation], kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Fit]:
    return {kind: cross_validated(kind, evaluations, where.singles) for kind in kinds}


@pytest.fixture(scope="module")
def paired() -> World:
    return world(pairwise)


@pytest.fixture(scope="module")
def fits(paired: World) -> dict[str, Fit]:
    return fits_of(paired, paired.evaluations(120, noise=0.02))


# --- what is found --------------------------------------------------------------------------------------------------


def test_rho_is_recovered_as_evaluations_grow(paired: World) -> None:
    errors = []
    for count in (25, 100, 400):
        model = cross_validated("interactions", paired.evaluations(count, noise=0.01), paired.singles, folds=2).model
        assert model.sites == tuple(SITES)
        errors.append(np.sqrt(np.mean(np.square(model.rho - paired.rho)[np.triu_indices(len(SITES), 1)])))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.03


def test_interactions_are_predicted_and_chosen_where_there_are_some(fits: dict[str, Fit]) -> None:
    assert fits["interactions"].spread < 0.5 * fits["sum"].spread
    assert fits["interactions"].spearman > fits["sum"].spearman
    assert abs(fits["interactions"].bias - 1) < 0.02 < abs(fits["sum"].bias - 1)
    assert best_of(list(fits.values())).model.kind == "interactions"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sum_is_chosen_where_it_is_the_law(seed: int) -> None:
    where = world(additive)
    fits = fits_of(where, where.evaluations(100, noise=0.06, seed=seed))
    assert all(fit.spread < 1.1 * fits["sum"].spread for fit in fits.values())
    assert best_of(list(fits.values())).model.kind == "sum"
    assert fits["sum"].measuring_error == pytest.approx(0.06, rel=0.3)


def test_a_power_is_found_and_its_curve_stays_level_beyond_the_sums_evaluated() -> None:
    where = world(saturating)
    evaluations = where.evaluations(80, noise=0.01)
    fits = fits_of(where, evaluations)
    assert fits["power"].spread < 0.02 < fits["sum"].spread
    assert best_of(list(fits.values())).model.kind == "power"
    sums = [sum(where.scores[item_id] for item_id in one.items) for one in evaluations]
    least = [ITEMS[0].id, ITEMS[1].id]  # below all that was evaluated
    small = np.array([where.scores[item_id] for item_id in least])
    assert small.sum() < min(sums)
    coupling = 1 - np.square(small).sum() / small.sum() ** 2
    level = small.sum() * np.exp(coupling * (0.1 - 0.3 * np.log(min(sums))))
    assert fits["power"].model.predict(least).mean == pytest.approx(level, rel=0.02)


def test_means_by_parts_and_distance_help_where_rho_follows_them() -> None:
    where = world(pairwise, lambda first, second, rng: 0.3 * (first % 2) * np.exp((first - second) / 4))
    fits = fits_of(where, where.evaluations(30, noise=0.01), ("interactions", "local"))
    assert fits["local"].spread < 0.7 * fits["interactions"].spread


def test_spread_and_choice_of_fits_are_as_said() -> None:
    where = world(additive)
    fit = cross_validated("sum", where.evaluations(20, noise=0.1), where.singles)
    true = np.array([one.kl_nats for one in fit.model.evaluations])
    total = np.array([sum(where.scores[item_id] for item_id in one.items) for one in fit.model.evaluations])
    np.testing.assert_allclose(fit.log_errors, np.log(total / true), rtol=1e-9)
    assert fit.spread == pytest.approx(np.log(total / true).std())
    assert fit.bias == pytest.approx(np.mean(total / true))
    errors = np.tile([0.1, -0.1], 10)
    often, seldom = np.tile([0.8, 0.8, 1.0, 1.0], 5), np.tile([0.8, 0.8, 1.15, 1.15], 5)
    simple, clear, lucky = (replace(fit, log_errors=tuple(errors * one)) for one in (np.ones(20), often, seldom))
    assert best_of([simple, clear]) is clear
    assert best_of([simple, lucky]) is simple  # 2 % less variance, a quarter of its own standard error
    assert best_of([clear, simple]) is clear


# --- how sure it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["interactions", "local", "local-of-curve"])
def test_two_standard_errors_cover_what_was_never_seen(paired: World, kind: str) -> None:
    fit = cross_validated(kind, paired.evaluations(160, noise=0.02), paired.singles)
    fresh = paired.evaluations(500, noise=0.02, seed=1)
    means, errors = fit.model.predict_many([one.items for one in fresh])
    distance = abs(means - np.array([one.kl_nats for one in fresh])) / errors
    assert 0.9 < np.mean(distance < 2) < 0.99
    assert 0.55 < np.mean(distance < 1) < 0.8
    assert 0.85 < fit.coverage < 1


def test_pairs_that_were_never_evaluated_are_less_sure(paired: World) -> None:
    first, second, third = (ITEMS[3 * place].id for place in (0, 4, 9))
    evaluations = [one for one in paired.evaluations(300, noise=0.02) if not {first, third} <= set(one.items)]
    last = {item.id for item in ITEMS if item.sites == (SITES[9],)}
    without_last = [replace(one, items=tuple(sorted(set(one.items) - last))) for one in evaluations]
    model = cross_validated("interactions", without_last, paired.singles).model
    seen, unseen = model.predict([first, second]), model.predict([first, third])
    assert unseen.standard_error / unseen.mean > 1.2 * seen.standard_error / seen.mean


# --- what holds by construction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_item_costs_its_score(fits: dict[str, Fit], paired: World, kind: str) -> None:
    means, errors = fits[kind].model.predict_many([[item.id] for item in ITEMS])
    assert means.tolist() == [paired.scores[item.id] for item in ITEMS]
    assert not errors.any()
    assert fits[kind].model.predict([]).mean == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_many_are_predicted_as_one(fits: dict[str, Fit], paired: World, kind: str) -> None:
    model = fits[kind].model
    architectures = [one.items for one in paired.evaluations(7, noise=0.0, seed=5)]
    means, errors = model.predict_many(architectures)
    for items, mean, error in zip(architectures, means, errors, strict=True):
        alone = model.predict(items)
        assert (alone.mean, alone.standard_error) == (pytest.approx(mean), pytest.approx(error))
        assert alone.mean == pytest.approx(model.predict(items[::-1]).mean)
    assert [len(part) for part in model.predict_many([])] == [0, 0]


@pytest.mark.parametrize("kind", ADDITIVE)
def test_scores_and_pairs_add_up_to_the_prediction(fits: dict[str, Fit], paired: World, kind: str) -> None:
    model = fits[kind].model
    items = paired.evaluations(1, noise=0.0, seed=6)[0].items
    pairs = [(first, second) for place, first in enumerate(items) for second in items[place + 1 :]]
    found = model.interactions(pairs)
    assert [(one.item_a, one.item_b) for one in found] == pairs
    total = sum(paired.scores[item_id] for item_id in items) + sum(one.value_nats for one in found)
    assert model.predict(items).mean == pytest.approx(total)
    (turned,) = model.interactions([pairs[0][::-1]])
    assert turned.value_nats == pytest.approx(found[0].value_nats)
    assert any(one.value_nats for one in found) == (kind != "sum")


def test_predictions_stay_above_a_share_of_the_sum() -> None:
    level = {item.id: 0.1 for item in ITEMS}
    places = [(a, b, variant) for a in range(len(SITES)) for b in range(a) for variant in range(3)]
    twos = [(ITEMS[3 * a + variant].id, ITEMS[3 * b + variant].id) for a, b, variant in places]
    evaluations = [Evaluation(two, 0.02, 0.0) for two in twos]  # rho is -0.9 everywhere: absurd for ten at once
    model = cross_validated("interactions", evaluations, singles(ITEMS, level)).model
    assert model.predict(twos[0]).mean == pytest.approx(0.02, rel=0.1)
    assert model.predict([item.id for item in ITEMS[::3]]).mean == pytest.approx(LEAST_RATIO * 1.0)


def test_order_does_not_matter(paired: World) -> None:
    evaluations = paired.evaluations(40, noise=0.02)
    shuffled = [replace(one, items=one.items[::-1]) for one in evaluations[::-1]]
    for kind in ("interactions", "local-of-curve"):
        fit, again = (cross_validated(kind, given, paired.singles) for given in (evaluations, shuffled))
        assert fit == again


def test_evaluations_of_one_item_are_dropped(paired: World) -> None:
    evaluations = paired.evaluations(20, noise=0.02)
    fit = cross_validated("interactions", evaluations, paired.singles)
    assert cross_validated("interactions", [*evaluations, Evaluation((ITEMS[0].id,), 9.0, 0.0)], paired.singles) == fit


@pytest.mark.parametrize("kind", KINDS)
def test_through_json_and_back(fits: dict[str, Fit], paired: World, kind: str) -> None:
    fit = fits[kind]
    stored = json.loads(json.dumps(to_json(fit)))
    again = from_json(Fit, stored, "fit.json")
    assert again == fit
    architectures = [one.items for one in paired.evaluations(5, noise=0.0, seed=7)]
    for own, theirs in zip(fit.model.predict_many(architectures), again.model.predict_many(architectures), strict=True):
        np.testing.assert_array_equal(own, theirs)
    with pytest.raises(CorruptFileError, match=r"model.json.*unknown kind of model 'cubic'; allowed: sum, "):
        from_json(InteractionModel, {**stored["model"], "kind": "cubic"}, "model.json")
    with pytest.raises(CorruptFileError, match="slope"):
        from_json(InteractionModel, {**stored["model"], "slope": 1}, "model.json")


# --- items over several sites ---------------------------------------------------------------------------------------

PAIR = layer_item(1, AttentionSpec("skip"), FfnSpec("linear"))


def test_a_pair_shares_its_score_out_as_its_parts_would(paired: World) -> None:
    attention, ffn = site_item(SITES[2], AttentionSpec("skip")), site_item(SITES[3], FfnSpec("linear"))
    (single,) = singles([PAIR, attention, ffn], {PAIR.id: 0.3, attention.id: 0.3, ffn.id: 0.1})[:1]
    assert single == Single(PAIR.id, (SITES[2], SITES[3]), (pytest.approx(0.75), pytest.approx(0.25)), 0.3)
    for scores in ({PAIR.id: 0.3, ffn.id: 0.1}, {PAIR.id: 0.3, attention.id: 0.0, ffn.id: -1e-9}):
        assert singles([PAIR, attention, ffn], scores)[0].shares == (0.5, 0.5)


def test_a_pair_interacts_by_its_sites_and_not_with_itself(paired: World) -> None:
    scores = {**paired.scores, PAIR.id: 0.3}
    known = singles([*ITEMS, PAIR], scores)
    model = cross_validated("interactions", paired.evaluations(60, noise=0.02), known).model
    other = ITEMS[0].id
    expected = sum(
        2 * model.rho[place, 0] * np.sqrt(share * 0.3 * scores[other])
        for place, share in zip((2, 3), known[-1].shares, strict=True)
    )
    assert model.interactions([(PAIR.id, other)])[0].value_nats == pytest.approx(expected)
    assert model.predict([PAIR.id, other]).mean == pytest.approx(0.3 + scores[other] + expected)
    assert model.rho[2, 3] != 0.0
    assert model.predict([PAIR.id]).mean == 0.3


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_equal_values_share_their_mean_rank() -> None:
    rising = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(np.array([5.0, 7.0, 7.0, 9.0]), rising) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(-np.exp(rising), rising) == pytest.approx(-1)
    assert spearman(np.ones(4), rising) == 0.0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_too_few_evaluations_say_what_to_do(paired: World) -> None:
    few = [*paired.evaluations(7, noise=0.02), Evaluation((ITEMS[0].id,), 0.1, 0.0)]
    with pytest.raises(
        ConfigError, match="^7 evaluations of two or more items are too few for 10 folds: evaluate at"
    ) as caught:
        cross_validated("interactions", few, paired.singles)
    assert "at least 10 architectures, or take fewer folds" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(cross_validated("interactions", few, paired.singles, folds=7).log_errors) == 7


def test_an_item_without_a_score_is_named(fits: dict[str, Fit], paired: World) -> None:
    lost = ITEMS[4].id
    rest = tuple(one for one in paired.singles if one.item_id != lost)
    with pytest.raises(MissingMeasurementError, match=f"no kl score for {lost}; run `puzzle score RUN`"):
        cross_validated("sum", paired.evaluations(30, noise=0.02), rest)
    for ask in (fits["sum"].model.predict, lambda items: fits["sum"].model.interactions([tuple(items)])):
        with pytest.raises(MissingMeasurementError, match="L000.ffn.fancy"):
            ask([lost, "L000.ffn.fancy"])


def test_kinds_with_a_curve_have_no_sum_over_pairs(fits: dict[str, Fit]) -> None:
    for kind in set(KINDS) - set(ADDITIVE):
        with pytest.raises(ConfigError, match="no sum over pairs of items; kinds that are: sum, interactions, local"):
            fits[kind].model.interactions([(ITEMS[0].id, ITEMS[3].id)])


def test_what_is_no_measurement_is_refused(paired: World) -> None:
    for items, kl, error in (((), 0.1, 0.0), (("a", "b"), 0.0, 0.0), (("a",), np.nan, 0.0), (("a",), 0.1, -1.0)):
        with pytest.raises(ConfigError, match="is no KL of a changed model"):
            Evaluation(items, kl, error)
    with pytest.raises(ConfigError, match="the kl score is not finite"):
        singles(ITEMS, {**paired.scores, ITEMS[0].id: np.nan})
    with pytest.raises(ConfigError, match="unknown kind of model 'cubic'"):
        cross_validated("cubic", paired.evaluations(10, noise=0.02), paired.singles)
    two = (ITEMS[0].id, ITEMS[3].id)
    nothing = singles(ITEMS, {**paired.scores, two[0]: 0.0, two[1]: -1e-9})
    with pytest.raises(ConfigError, match=f"the scores of {two[0]} {two[1]} add up to 0; leave its evaluation out"):
        cross_validated("sum", [*paired.evaluations(20, noise=0.02), Evaluation(two, 0.1, 0.0)], nothing)
