"""The search space: which variants every layer is offered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from puzzle.config import FusionFile
from puzzle.space import SearchSpace, hardware_multiple
from puzzle.types import ConfigError, FfnSpec, ModelShape, Site
from puzzle.variants import shape_id, variant_name

SHAPE = ModelShape("llama", 3, 64, 4, 4, 16, 96, 128, 256, tied_embeddings=True)
MIXED = replace(
    SHAPE,
    windows=(8, None, 8),
    moe_layers=(0, 2),
    num_experts=8,
    num_active_experts=2,
    moe_intermediate_size=24,
)


def names(space: SearchSpace, layer: int, part: str) -> list[str]:
    return [variant_name(spec) for spec in space.on_offer[Site(layer, part)]]  # type: ignore[arg-type]


def test_a_space_expands_divisors_rounds_percentages_and_drops_doubles() -> None:
    offered = {
        "attention": ["gqa-*", "skip", "gqa-4"],
        "ffn": ["narrow-50%", "narrow-48", "narrow-100%", "keep"],
    }
    space = SearchSpace.parse(offered, SHAPE, multiple_of=16)  # type: ignore[arg-type]
    assert names(space, 1, "attention") == ["keep", "gqa-2", "gqa-1", "skip"]
    assert names(space, 1, "ffn") == ["keep", "narrow-48"]
    items = space.items()
    assert len(items) == 3 * (4 + 2)
    assert items[0].id == "L000.attention.keep"
    assert items[-1].sites == (Site(2, "ffn"),)


def test_each_layer_takes_what_it_can_have() -> None:
    offered = {"attention": ["window-8", "window-4", "gqa-2"], "ffn": ["narrow-48", "experts-4", "active-1", "skip"]}
    space = SearchSpace.parse(offered, MIXED)  # type: ignore[arg-type]
    assert names(space, 0, "attention") == names(space, 2, "attention") == ["keep", "window-4", "gqa-2"]
    assert names(space, 1, "attention") == ["keep", "window-8", "window-4", "gqa-2"]
    assert names(space, 0, "ffn") == names(space, 2, "ffn") == ["keep", "experts-4", "active-1", "skip"]
    assert names(space, 1, "ffn") == ["keep", "narrow-48", "skip"]


def test_single_layers_can_be_given_their_own() -> None:
    offered = {"attention": ["gqa-2"], "ffn": ["skip"]}
    space = SearchSpace.parse(offered, SHAPE, layers={1: {"attention": []}, 2: {"ffn": ["linear"]}})  # type: ignore[arg-type]
    assert names(space, 0, "attention") == ["keep", "gqa-2"]
    assert names(space, 1, "attention") == ["keep"]
    assert [names(space, layer, "ffn") for layer in range(3)] == [
        ["keep", "skip"],
        ["keep", "skip"],
        ["keep", "linear"],
    ]
    with pytest.raises(ConfigError, match="the teacher has layers 0 to 2, not 3"):
        SearchSpace.parse(offered, SHAPE, layers={3: {}})  # type: ignore[arg-type]


def test_pairs_are_all_combinations_of_a_layer() -> None:
    space = SearchSpace.parse({"attention": ["gqa-2"], "ffn": ["skip"]}, SHAPE, pairs=True)
    ids = [item.id for item in space.items()]
    assert len(ids) == 3 * 2 * 2
    assert ids[:4] == ["L000.keep+keep", "L000.keep+skip", "L000.gqa-2+keep", "L000.gqa-2+skip"]
    assert space.items()[3].sites == (Site(0, "attention"), Site(0, "ffn"))


@pytest.mark.parametrize(
    ("attention", "ffn", "message"),
    [
        (["window-8"], [], "window-8: no layer of the teacher can have this attention; leave it out"),
        ([], ["narrow-48"], "narrow-48: no layer of the teacher can have this ffn; leave it out"),
    ],
)
def test_what_no_layer_can_have_is_an_error(attention: list[str], ffn: list[str], message: str) -> None:
    shape = replace(MIXED, windows=(8, 8, 8), moe_layers=(0, 1, 2))
    with pytest.raises(ConfigError, match=message):
        SearchSpace.parse({"attention": attention, "ffn": ffn}, shape)


def test_widths_are_rounded_to_what_hardware_likes() -> None:
    multiples = {width: hardware_multiple(width) for width in (512, 1024, 14336)}
    assert multiples == {512: 8, 1024: 64, 14336: 256}


def test_what_a_run_of_layers_says_is_not_said_by_its_parts() -> None:
    """Single sites and pairs alike; where nothing can be left out alone, nothing meets."""
    skips = {"attention": ["skip"], "ffn": ["skip"]}
    single = SearchSpace.parse(skips, SHAPE, runs=2)
    assert {conflict.item_ids for conflict in single.conflicts()} == {
        *((f"L00{layer}.attention.skip", f"L00{layer}.ffn.skip") for layer in range(3)),
        ("L000-L000.skip", "L001-L001.skip"),
        ("L001-L001.skip", "L002-L002.skip"),
    }
    pairs = SearchSpace.parse(skips, SHAPE, pairs=True, runs=3)
    assert {conflict.item_ids for conflict in pairs.conflicts()} == {
        ("L000.skip+skip", "L001.skip+skip"),
        ("L001.skip+skip", "L002.skip+skip"),
        ("L000.skip+skip", "L001-L002.skip"),
        ("L000-L001.skip", "L002.skip+skip"),
    }
    only = {"attention": ["linear"], "ffn": ["skip"]}
    assert SearchSpace.parse(only, SHAPE, pairs=True, runs=3).conflicts() == ()
    assert SearchSpace.parse(skips, SHAPE).conflicts() == ()


def fusing(shape: ModelShape = SHAPE, ffn: tuple[str, ...] = ("keep",), **others: Any) -> SearchSpace:
    offered = {"attention": ["gqa-2"], "ffn": ["keep", "linear", *(() if shape.moe_layers else ("narrow-48",))]}
    return SearchSpace.parse(offered, shape, fusion=FusionFile(max_layers=3, ffn=ffn), **others)  # type: ignore[arg-type]


def test_fused_runs_cover_all_but_the_first_attention() -> None:
    space = fusing(ffn=("keep", "narrow-50%"), multiple_of=48)
    assert [item.id for item in space.fused] == [
        "L000-L001.fused-2x96",
        "L000-L002.fused-3x96",
        "L001-L002.fused-2x96",
        "L000-L001.fused-2x48",
        "L000-L002.fused-3x48",
        "L001-L002.fused-2x48",
    ]
    assert space.items()[-6:] == space.fused and space.conflicts() == ()
    item = space.fused[1]
    assert list(map(str, item.sites)) == ["L000.ffn", "L001.attention", "L001.ffn", "L002.attention", "L002.ffn"]
    assert item.specs[0] == FfnSpec("narrow", 288, num_fused=3)
    assert {spec.kind for spec in item.specs[1:]} == {"skip"}
    assert shape_id(item.specs[0], SHAPE) == "ffn.narrow-288"
    assert shape_id(space.fused[3].specs[0], SHAPE) == "ffn.narrow-96"  # as wide as the teacher's own


def test_runs_are_fused_only_where_every_layer_offers_the_ffn() -> None:
    only_narrow = fusing(replace(SHAPE, num_layers=4), ("narrow-48",), layers={1: {"ffn": ["linear"]}})
    assert [item.id for item in only_narrow.fused] == ["L002-L003.fused-2x48"]
    experts = replace(MIXED, num_layers=4, windows=(), moe_layers=(1,))
    assert [item.id for item in fusing(experts).fused] == ["L002-L003.fused-2x96"]


@pytest.mark.parametrize(
    ("shape", "others", "message"),
    [
        (replace(SHAPE, post_norms=True), {}, "fusion: norms after the FFNs, which this teacher has"),
        (MIXED, {}, "fusion: keep is on offer in no two consecutive layers without experts"),
        (SHAPE, {"pairs": True}, "fusion: a fused run begins with an FFN"),
        (SHAPE, {"ffn": ("linear",)}, "fusion: linear cannot be fused; allowed: keep, narrow-N"),
        (SHAPE, {"ffn": ("narrow-24",)}, "fusion: narrow-24 is on offer in no two .* add it to ffn"),
    ],
)
def test_what_cannot_be_fused_says_why(shape: ModelShape, others: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fusing(shape, **others)


def test_a_model_with_fused_ffns_is_no_context() -> None:
    with pytest.raises(ConfigError, match=r"L000\.ffn: one FFN of a fused run cannot be changed alone"):
        fusing().items_of({"L000.ffn": "fused-2x96", "L001.attention": "skip", "L001.ffn": "skip"})
