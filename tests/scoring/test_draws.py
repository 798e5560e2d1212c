"""Random and near-optimal architectures over a range of sizes."""

from __future__ import annotations

import pytest

from puzzle.scoring.draws import SIZES, draw
from puzzle.types import AttentionSpec, ConfigError, FfnSpec, Item, ModelShape
from puzzle.variants import params, run_item, site_item

SHAPE = ModelShape("llama", 6, 64, 4, 4, 16, 128, 100, 64, tied_embeddings=True)
KINDS = {
    "attention": [AttentionSpec("keep"), AttentionSpec("gqa", 2), AttentionSpec("gqa", 1), AttentionSpec("skip")],
    "ffn": [FfnSpec("keep"), FfnSpec("narrow", 64), FfnSpec("narrow", 32), FfnSpec("skip")],
}
ITEMS = [site_item(site, spec) for site in SHAPE.sites for spec in KINDS[site.part]]
SCORES = {item.id: 0.01 * (1 + item.sites[0].layer) * KINDS[item.sites[0].part].index(item.specs[0]) for item in ITEMS}


def sizes(items: list[Item]) -> dict[str, int]:
    return {item.id: sum(params(spec, SHAPE) for spec in item.specs) for item in items}


def test_they_cover_every_site_once_differ_and_have_the_size_asked_for() -> None:
    found = draw(ITEMS, SCORES, sizes(ITEMS), 40)
    assert len({one.items for one in found}) == 40
    by_id = {item.id: item for item in ITEMS}
    whole = sum(size for name, size in sizes(ITEMS).items() if name.endswith("keep"))
    for one in found:
        assert [site for name in one.items for site in by_id[name].sites] == list(SHAPE.sites)
        share = sum(sizes(ITEMS)[name] for name in one.items) / whole
        low, high = SIZES[one.size]
        assert low - 0.1 < share <= high
    assert {(one.kind, one.size) for one in found} == {
        (kind, size) for kind in ("near-optimal", "random") for size in ("mild", "hard")
    }


def test_near_optimal_ones_cost_less() -> None:
    found = draw(ITEMS, SCORES, sizes(ITEMS), 40)
    for size in SIZES:
        near, far = (
            [sum(SCORES[name] for name in one.items) for one in found if (one.kind, one.size) == (kind, size)]
            for kind in ("near-optimal", "random")
        )
        assert sum(near) / len(near) < 0.8 * sum(far) / len(far)


def test_the_first_ones_do_not_depend_on_how_many_there_are() -> None:
    assert draw(ITEMS, SCORES, sizes(ITEMS), 30)[:9] == draw(ITEMS, SCORES, sizes(ITEMS), 9)


def test_runs_of_layers_are_left_out() -> None:
    items = [*ITEMS, run_item(1, 2)]
    scores = {**SCORES, "L001-L002.skip": 0.0}
    assert draw(items, scores, sizes(items), 8) == draw(ITEMS, SCORES, sizes(ITEMS), 8)


def test_too_small_a_space_is_refused() -> None:
    few = [item for item in ITEMS if item.specs[0].kind == "keep" or item.id == "L000.ffn.skip"]
    with pytest.raises(ConfigError, match="no 5 different architectures"):
        draw(few, SCORES, sizes(few), 5)
