"""Distillation and scoring within a memory budget: what fits is taken, what cannot is refused before it runs."""

from __future__ import annotations

import pytest

from puzzle.config import SpaceFile
from puzzle.memory_plan import (
    BYTES_PER_TRAINED_PARAM,
    Batches,
    BldPlan,
    Machine,
    ScorePlan,
    Unit,
    activation_bytes,
    check_init,
    init_bytes,
    plan_bld,
    plan_one_pass,
    plan_scores,
)
from puzzle.space import SearchSpace
from puzzle.types import GIB, AttentionSpec, ConfigError, FfnSpec, ModelShape, Spec
from puzzle.variants import WEIGHTLESS, has_weights, params
from puzzle.yamlfiles import load, locate

LLAMA_70B = ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072, tied_embeddings=False)
EIGHT_B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied_embeddings=False)
EIGHT_B_LAYER = 4 * 218_103_808  # bytes in fp32
BATCHES = Batches(count=6000, tokens=8 * 2048, dtype_bytes=2)  # 98M tokens


def units_of(shape: ModelShape, widths: tuple[float, ...] = (0.87, 0.5, 0.25)) -> list[Unit]:
    return [
        Unit(f"L{layer}.{width}", layer, round(3 * shape.hidden_size * shape.intermediate_size * width))
        for layer in range(shape.num_layers)
        for width in widths
    ]


def shipped_space(shape: ModelShape) -> SearchSpace:
    file = load(SpaceFile, locate("space", "llama"))
    return SearchSpace.parse({"attention": file.attention, "ffn": file.ffn}, shape, file.ffn_multiple_of)


def plan(gib: float, host_gib: float = 500, disk_gib: float = 0, batches: Batches = BATCHES) -> BldPlan:
    machine = Machine(gib * GIB, host_gib * GIB, disk_gib * GIB, shared=False)
    return plan_bld(LLAMA_70B, units_of(LLAMA_70B), batches, machine)


def test_a_70b_teacher_fits_one_gpu_of_80_gb() -> None:
    found = plan(0.9 * 80e9 / GIB)
    assert found.residual == "recompute"
    assert not found.hold_teacher
    assert found.chunk >= 64
    assert found.needed_bytes <= 0.9 * 80e9
    assert [name for group in found.groups for name in group] == [unit.name for unit in units_of(LLAMA_70B)]


def test_the_readmes_figures_for_the_shipped_space() -> None:
    units = [
        Unit(item.id, item.sites[0].layer, params(item.specs[0], LLAMA_70B))
        for item in shipped_space(LLAMA_70B).items()
        if has_weights(item)
    ]
    found = plan_bld(LLAMA_70B, units, BATCHES, Machine(0.9 * 80e9, 200 * GIB, 0, shared=False))
    assert (len(units), len(found.groups), found.chunk) == (880, 107, 200)
    assert 2 * sum(unit.num_params for unit in units) == pytest.approx(388e9, rel=0.01)


def test_the_need_does_not_grow_with_the_number_of_layers() -> None:
    few = ModelShape(**{**vars(LLAMA_70B), "num_layers": 8})
    machine = Machine(67 * GIB, 500 * GIB, 0, shared=False)
    found = [plan_bld(shape, units_of(shape), BATCHES, machine, "disk") for shape in (few, LLAMA_70B)]
    assert found[0].needed_bytes == found[1].needed_bytes


def test_more_room_makes_fewer_groups() -> None:
    sizes = [len(plan(gib).groups) for gib in (40, 80, 160, 320)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_the_stream_goes_where_there_is_room() -> None:
    short = Batches(100, 8 * 2048, 2)  # 25 GiB
    assert plan(67, host_gib=100, batches=short).residual == "memory"
    assert plan(67, host_gib=20, disk_gib=100, batches=short).residual == "disk"
    assert plan(67, host_gib=20, disk_gib=20, batches=short).residual == "recompute"


def test_on_a_cpu_the_stream_counts_against_the_budget() -> None:
    small = ModelShape("llama", 16, 1024, 16, 8, 64, 4096, 32000, 8192, tied_embeddings=False)
    units = units_of(small, (0.5,))
    batches = Batches(64, 2048, 4)
    residual = 64 * 2048 * 1024 * 4
    least = activation_bytes(small, 2048) + BYTES_PER_TRAINED_PARAM * units[0].num_params
    roomy = plan_bld(small, units, batches, Machine(4 * residual + least, 0, 0, shared=True))
    assert roomy.residual == "memory"
    assert roomy.needed_bytes <= 4 * residual + least
    assert roomy.needed_bytes > residual


def test_what_cannot_fit_says_how_much_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"one unit at a time needs \d+\.\d+ GiB where 4\.00 GiB may be used"):
        plan(4)


def test_nothing_to_train_needs_no_group() -> None:
    assert plan_bld(LLAMA_70B, [], BATCHES, Machine(80 * GIB, 0, 0, shared=False)).groups == ()


def test_scoring_shares_what_is_left_over_among_changes() -> None:
    """8B on 80 GB holds the teacher and has room for several variants; 70B is read a layer at a time."""
    sequences = Batches(64, 2048, 2)
    machine = Machine(72 * GIB, 200 * GIB, 1e12, False)
    small, large = (plan_scores(shape, sequences, machine, 64) for shape in (EIGHT_B, LLAMA_70B))
    assert small == ScorePlan(True, 16, 64, 64)
    assert not large.hold_teacher and 4 <= large.together < 16 and large.chunk == 64
    tight = plan_scores(LLAMA_70B, sequences, Machine(20 * GIB, 200 * GIB, 1e12, False), 64)
    assert tight.together == 1 and 1 <= tight.chunk < 64
    with pytest.raises(ConfigError, match="score: one change on one batch needs .* raise memory_budget_gib"):
        plan_scores(LLAMA_70B, sequences, Machine(8 * GIB, 200 * GIB, 1e12, False), 64)


def test_further_rounds_of_sequences_are_part_of_the_plan() -> None:
    """What changes begin from is kept for all rounds: in memory up to half of the room, the rest in files."""
    first, most = Batches(8, 8 * 2048, 2), 1000
    a_batch = 2 * 4 * 8 * 2048 * 4096  # two streams: half a GiB
    found = plan_scores(EIGHT_B, first, Machine(72 * GIB, 200 * GIB, 4000 * GIB, False), most)
    assert (found.in_memory, found.chunk) == (200, 8)
    assert a_batch == GIB / 2
    few = plan_scores(EIGHT_B, first, Machine(72 * GIB, 200 * GIB, 0, False), 200)
    assert few.in_memory == 200 and few.together == found.together  # how many there may be costs the device nothing
    with pytest.raises(
        ConfigError, match=r"1000 batches take 500\.00 GiB, .* memory has room for 100\.00 GiB and the disk"
    ):
        plan_scores(EIGHT_B, first, Machine(72 * GIB, 200 * GIB, 700 * GIB, False), most)
    alone, many = (plan_scores(EIGHT_B, first, Machine(64 * GIB, 0, 4000 * GIB, True), count) for count in (8, most))
    assert (alone.in_memory, many.in_memory) == (8, 64)
    assert many.together * (EIGHT_B_LAYER + 8 * a_batch / 2) + 64 * a_batch < 64 * GIB
    assert alone.together > many.together >= 1


def test_one_pass_plans_the_device_and_the_host() -> None:
    """What enters each layer is the host's, the variants of a layer and one batch's gradients are the device's."""
    sequences = Batches(8, 8 * 2048, 2)
    sizes = [params(spec, LLAMA_70B) for spec in sorted(variants_of_a_layer(LLAMA_70B), key=str)]
    roomy = plan_one_pass(LLAMA_70B, sequences, 4, Machine(400e9, 2000 * GIB, 0, shared=False), False)
    assert roomy.chunk == 8 and roomy.groups(sizes) == [range(len(sizes))]
    assert plan_one_pass(LLAMA_70B, sequences, 4, Machine(400e9, 200 * GIB, 0, shared=False), False).chunk == 2
    tight = plan_one_pass(LLAMA_70B, sequences, 4, Machine(45e9, 2000 * GIB, 0, shared=False), False)
    groups = tight.groups(sizes)
    assert len(groups) > 1 and [place for group in groups for place in group] == list(range(len(sizes)))
    assert all(4 * sum(sizes[place] for place in group) <= tight.variant_bytes for group in groups)
    assert max(sizes) <= tight.variant_bytes < 45e9 - activation_bytes(LLAMA_70B, sequences.tokens)
    with pytest.raises(ConfigError, match="score: one variant on one batch needs .* raise memory_budget_gib"):
        plan_one_pass(LLAMA_70B, sequences, 4, Machine(20e9, 2000 * GIB, 0, shared=False), False)
    with pytest.raises(ConfigError, match="score: one batch needs .* of the host's memory .* lower data"):
        plan_one_pass(LLAMA_70B, sequences, 4, Machine(400e9, 20 * GIB, 0, shared=False), False)


def test_one_pass_on_a_cpu_shares_one_budget() -> None:
    small = ModelShape("llama", 16, 1024, 16, 8, 64, 4096, 32000, 8192, tied_embeddings=False)
    sequences = Batches(32, 2048, 4)
    a_batch = 4 * 2048 * 1024 * (16 + 1 + 4)  # as it is kept between the layers
    for gib in (1.6, 2.0, 4.0, 32.0):
        found = plan_one_pass(small, sequences, 4, Machine(gib * GIB, 0, 0, shared=True), False)
        assert found.variant_bytes + found.chunk * a_batch < gib * GIB
    assert found.chunk == 32
    least = plan_one_pass(small, sequences, 4, Machine(1.6 * GIB, 0, 0, shared=True), False)
    assert 1 <= least.chunk < 32 and least.variant_bytes > 0


def variants_of_a_layer(shape: ModelShape) -> set[Spec]:
    """What the shipped space offers in place of one layer's blocks."""
    here = (specs for site, specs in shipped_space(shape).on_offer.items() if site.layer == 0)
    return {spec for specs in here for spec in specs if spec.kind not in WEIGHTLESS}


@pytest.mark.parametrize(("shape", "gigabytes"), [(LLAMA_70B, 68), (EIGHT_B, 21)])
def test_starting_points_take_what_the_readme_says(shape: ModelShape, gigabytes: float) -> None:
    assert round(init_bytes(shape, 0, variants_of_a_layer(shape), 8 * 2048) / 1e9) == gigabytes


def test_starting_points_hold_the_moments_of_what_is_asked_for() -> None:
    narrow, wide = FfnSpec("narrow", intermediate_size=7168), FfnSpec("narrow", intermediate_size=24832)
    attention, joint = AttentionSpec("linear"), 8 * (28672 + 8192 + 1) ** 2
    sizes = [init_bytes(LLAMA_70B, 0, specs, 2048) for specs in ([attention], [narrow], [wide], [wide, narrow])]
    assert sizes == sorted(sizes)
    assert sizes[0] < joint
    assert sizes[1] > joint + 3 * 8 * 28672**2  # and what elimination takes


def test_starting_points_that_do_not_fit_are_refused() -> None:
    specs = {layer: variants_of_a_layer(EIGHT_B) for layer in range(32)}
    batches = Batches(18, 8 * 2048, 4)
    check_init(EIGHT_B, specs, batches, Machine(22e9, 0, 0, shared=False))
    for gib, shared in ((10, False), (22e9 / GIB, True)):  # on a CPU the stream has to fit, too
        with pytest.raises(ConfigError, match=r"init: the starting points of one layer need \d+\.\d+ GiB where"):
            check_init(EIGHT_B, specs, batches, Machine(gib * GIB, 0, 0, shared))


def test_scoring_makes_room_for_wider_ffns() -> None:
    """A fused one of four: its weights beside those it is fused from, and its activations."""
    first, wider = Batches(8, 8 * 2048, 2), 3 * EIGHT_B.intermediate_size
    plain, fused = (plan_scores(EIGHT_B, first, Machine(48 * GIB, 0, 4e12, True), 8, more) for more in (0, wider))
    assert 1 <= fused.together < plain.together
    own = 4 * 3 * EIGHT_B.hidden_size * wider
    assert fused.together * (EIGHT_B_LAYER + 2 * own) + 20 * wider * first.tokens < 48 * GIB
