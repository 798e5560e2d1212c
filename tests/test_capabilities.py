"""The matrix of what runtimes load, cell by cell, and what it leaves of a search space."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from puzzle import capabilities
from puzzle.capabilities import (
    MATRIX,
    NEMOTRON,
    PADDING,
    Feature,
    capability,
    offer,
    served_as,
    together,
    told,
)
from puzzle.space import SearchSpace
from puzzle.types import AttentionSpec, Capability, ConfigError, FfnSpec, Item, ModelShape, Site, Spec, Target
from puzzle.variants import KINDS, layer_item, params, parse_variant, resolve, run_item, site_item

TARGETS: tuple[Target, ...] = get_args(Target)
SHAPE = ModelShape("llama", 4, 1024, 16, 8, 64, 2816, 512, 4096, tied_embeddings=False)
NAMES = {
    "attention": ["keep", "gqa-2", "window-512", "window-512-sinks-4", "linear", "skip"],
    "ffn": ["keep", "narrow-512", "narrow-700", "linear", "skip"],
}
S, L, R = "supported", "lowered", "refused"
# columns: transformers, vllm-plugin, vllm, sglang, tensorrt-llm, llama.cpp, mlx-lm; mid-stack unless a layer is given
EXPECTED = {
    ("attention", "keep", 1): (S, S, S, S, S, S, S),
    ("attention", "gqa-2", 0): (S, S, S, S, S, S, S),
    ("attention", "window-512", 1): (S, S, L, R, R, R, R),
    ("attention", "window-512-sinks-4", 1): (S, R, R, R, R, R, R),
    ("attention", "linear", 1): (S, S, R, R, S, S, L),
    ("attention", "linear", 0): (S, S, R, R, S, S, L),
    ("attention", "skip", 1): (S, S, S, S, S, S, S),
    ("attention", "skip", 3): (S, S, S, S, S, S, S),
    ("attention", "skip", 0): (S, S, R, R, S, L, S),
    ("ffn", "keep", 1): (S, S, S, S, S, S, S),
    ("ffn", "narrow-512", 1): (S, S, S, S, S, S, S),
    ("ffn", "narrow-700", 1): (S, S, L, L, L, S, L),
    ("ffn", "linear", 1): (S, S, R, R, S, L, L),
    ("ffn", "skip", 3): (S, S, S, S, S, S, S),
}
BESIDE = {
    ("gqa-2", "skip", 1): (S, S, S, S, S, L, S),
    ("linear", "skip", 1): (S, S, S, S, S, L, S),
    ("skip", "skip", 1): (S, S, S, S, S, S, S),
    ("skip", "skip", 3): (S, S, S, S, S, L, S),
    ("skip", "narrow-512", 3): (S, S, S, S, S, S, S),
    ("gqa-2", "narrow-512", 3): (S, S, S, S, S, S, S),
}


def spec_of(part: str, name: str, shape: ModelShape = SHAPE, layer: int = 1) -> Spec:
    spec = resolve(parse_variant(part, name, shape), shape, layer)  # type: ignore[arg-type]
    assert spec is not None
    return spec


@pytest.mark.parametrize(("part", "name", "layer"), EXPECTED)
def test_every_variant_at_every_position(part: str, name: str, layer: int) -> None:
    found = [capability(target, spec_of(part, name), layer, SHAPE) for target in TARGETS]
    assert tuple(one.status for one in found) == EXPECTED[part, name, layer]
    for target, one in zip(TARGETS, found, strict=True):
        assert one.target == target
        assert bool(one.reason) == (one.status != "supported")
        assert bool(one.lowered_to) == (one.status == "lowered")


@pytest.mark.parametrize(("attention", "ffn", "layer"), BESIDE)
def test_both_blocks_of_a_layer(attention: str, ffn: str, layer: int) -> None:
    specs = spec_of("attention", attention), spec_of("ffn", ffn)
    found = [together(target, *specs, layer, SHAPE.num_layers) for target in TARGETS]  # type: ignore[arg-type]
    assert tuple(one.status for one in found) == BESIDE[attention, ffn, layer]


def test_every_kind_of_variant_is_in_the_table() -> None:
    tested = {(part, name.split("-")[0]) for part, name, _ in EXPECTED} | {("ffn", "experts"), ("ffn", "active")}
    assert tested == {(part, kind) for part, kinds in KINDS.items() for kind in kinds}
    assert set(MATRIX) == set(get_args(Feature))
    assert {"vllm-plugin", *NEMOTRON} == set(TARGETS) - {"transformers"}
    assert {target for row in MATRIX.values() for target in row} <= set(TARGETS) - {"transformers"}


@pytest.mark.parametrize("target", TARGETS)
def test_experts_are_for_our_own_export_alone(target: Target) -> None:
    experts = replace(SHAPE, moe_layers=(1,), num_experts=8, num_active_experts=2, moe_intermediate_size=64)
    for name in ("experts-4", "active-1"):
        found = capability(target, spec_of("ffn", name, experts), 1, experts)
        assert found.status == (S if target in ("transformers", "vllm-plugin") else R)


def test_a_width_is_padded_and_the_teachers_own_too() -> None:
    odd = replace(SHAPE, intermediate_size=2800)
    found = capability("vllm", spec_of("ffn", "keep", odd), 1, odd)
    assert (found.status, found.lowered_to) == ("lowered", "2816 channels, those past 2800 zeros")


PADDED, ZEROS = FfnSpec("narrow", intermediate_size=768), FfnSpec("narrow", intermediate_size=32)
RENAMED = {("attention", "window-512", 1), ("attention", "linear", 0), ("attention", "linear", 1)}
COSTS_OF = {
    ("ffn", "narrow-700", 1): dict.fromkeys(PADDING, (PADDED,)),
    ("attention", "skip", 0): {"llama.cpp": (AttentionSpec("linear"),)},
    ("ffn", "linear", 1): {"llama.cpp": (FfnSpec("linear"), ZEROS, ZEROS)},  # and of what is left behind
    ("ffn", "skip", 3): {"llama.cpp": (ZEROS,)},  # beside what, an item of its own does not know
}


@pytest.mark.parametrize(("part", "name", "layer"), EXPECTED)
def test_what_is_lowered_to_other_sizes_is_served_as_them(part: str, name: str, layer: int) -> None:
    spec = spec_of(part, name, layer=layer)
    item = site_item(Site(layer, part), spec)  # type: ignore[arg-type]
    for target, status in zip(TARGETS, EXPECTED[part, name, layer], strict=True):
        if status == R:
            continue
        form = served_as(item, target, SHAPE)
        assert form == COSTS_OF.get((part, name, layer), {}).get(target, form)
        costs = [sum(params(one, SHAPE) for one in specs) for specs in (form, (spec,))]
        renamed = (part, name, layer) in RENAMED or target == "mlx-lm" and name == "linear"
        beside = (part, name, target) == ("ffn", "skip", "llama.cpp")
        assert (costs[0] > costs[1]) == (status == L and not renamed or beside)


def test_an_item_of_both_parts_knows_whether_zeros_are_needed() -> None:
    skip, ffn = AttentionSpec("skip"), FfnSpec("skip")
    assert served_as(run_item(1, 1), "llama.cpp", SHAPE) == (skip, ffn)
    beside = layer_item(1, AttentionSpec("gqa", 2), ffn)
    assert served_as(beside, "llama.cpp", SHAPE) == (AttentionSpec("gqa", 2), ZEROS)
    assert served_as(beside, "mlx-lm", SHAPE) == beside.specs
    odd = replace(SHAPE, intermediate_size=2800)
    (form,) = served_as(site_item(Site(1, "ffn"), FfnSpec("keep")), "vllm", odd)
    assert form == FfnSpec("narrow", intermediate_size=2816)


def space_items(shape: ModelShape = SHAPE, **changes: object) -> tuple[Item, ...]:
    return SearchSpace.parse({**NAMES, **changes}, shape, 1).items()  # type: ignore[dict-item]


def test_only_what_all_targets_load_is_on_offer() -> None:
    items = space_items()
    assert offer(items, (), SHAPE).items == items
    assert offer(items, ("transformers",), SHAPE).items == items
    for_both = offer(items, ("transformers", "vllm"), SHAPE)
    kept = {item.id for item in for_both.items}
    gone = {item.id for item in items} - kept
    assert gone == {
        "L000.attention.skip",
        *(f"L{layer:03d}.attention.{name}" for layer in range(4) for name in ("window-512-sinks-4", "linear")),
        *(f"L{layer:03d}.ffn.linear" for layer in range(4)),
    }
    assert for_both.conflicts == ()
    lines = told(for_both.refused)
    assert "vllm refuses attention skip at layer 0: a first layer without attention crashes" in lines
    assert "vllm refuses ffn linear at layers 0-3: nemotron-nas's linear blocks fail to load (TypeError)" in lines
    assert len(lines) == 4
    needs = told(for_both.lowered)
    assert (
        "vllm needs ffn narrow-700 as 768 channels, those past 700 zeros at layers 0-3: widths are multiples of 256"
        in needs
    )
    assert set(told(offer(items, ("vllm", "sglang"), SHAPE).refused)) > set(lines)


def test_windows_of_two_sizes_are_too_many_for_vllm() -> None:
    one = offer(space_items(attention=["keep", "window-512"]), ("vllm",), SHAPE)
    assert {item.id.split(".")[-1] for item in one.items if item.sites[0].part == "attention"} == {"keep", "window-512"}
    two = offer(space_items(attention=["keep", "window-512", "window-256"]), ("vllm",), SHAPE)
    assert {item.id.split(".")[-1] for item in two.items if item.sites[0].part == "attention"} == {"keep"}
    assert "on offer are 256, 512" in told(two.refused)[0]


def test_a_site_with_nothing_left_says_why() -> None:
    items = [item for item in space_items() if item.sites[0] != Site(0, "attention") or item.specs[0].kind == "skip"]
    with pytest.raises(
        ConfigError,
        match=r"nothing is left for L000.attention: vllm refuses attention skip at layer 0: .*; add a variant",
    ):
        offer(items, ("vllm",), SHAPE)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(SHAPE, family="qwen3", qk_norm=True), "the teacher is a qwen3"),
        (replace(SHAPE, qkv_bias=True), "the teacher has biases"),
    ],
)
def test_a_teacher_that_is_not_llama_shaped(shape: ModelShape, reason: str) -> None:
    assert offer(space_items(shape), ("transformers",), shape).items
    with pytest.raises(
        ConfigError, match=f"serve_on: llama.cpp reads nemotron-nas, which is Llama-shaped, but {reason}"
    ):
        offer(space_items(shape), ("transformers", "llama.cpp"), shape)


def test_items_over_several_sites_are_judged_by_all_of_them() -> None:
    attention, ffn = spec_of("attention", "keep"), spec_of("ffn", "linear")
    assert isinstance(attention, AttentionSpec)
    assert isinstance(ffn, FfnSpec)
    wide = (run_item(0, 1), run_item(1, 2), layer_item(2, attention, ffn))
    found = offer([*space_items(), *wide], ("vllm",), SHAPE)
    assert {one.item.id for one in found.refused if len(one.item.sites) > 1} == {wide[0].id, wide[2].id}
    assert wide[1] in found.items


def test_what_does_not_go_together_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the matrix is refused only beside something else today; exporters may find such a thing."""

    def picky(target: Target, attention: AttentionSpec, ffn: FfnSpec, layer: int, num_layers: int) -> Capability:
        bad = target == "mlx-lm" and layer == 2 and (attention.kind, ffn.kind) == ("gqa", "skip")
        return Capability(target, "refused", "not these two") if bad else Capability(target, "supported", "")

    monkeypatch.setattr(capabilities, "together", picky)
    items = space_items(attention=["keep", "gqa-2"])
    (conflict,) = offer(items, ("mlx-lm",), SHAPE).conflicts
    assert conflict.item_ids == ("L002.attention.gqa-2", "L002.ffn.skip")
    assert "mlx-lm" in conflict.reason
    assert "not these two" in conflict.reason
    pair = layer_item(2, *(spec_of("attention", "gqa-2"), spec_of("ffn", "skip")))  # type: ignore[arg-type]
    assert [one.item for one in offer([*items, pair], ("mlx-lm",), SHAPE).refused] == [pair]
