"""What a page is gathered from: points of the front, choices, limits; and the scales that charts are drawn on."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from puzzle.report.charts import HeatScale
from puzzle.report.front import to_get
from puzzle.report.layers import layers_of
from puzzle.report.searched import FRONT_POINTS, REACH, Trade, searched
from puzzle.report.svg import Scale, figure
from puzzle.search.problem import Quantity, Row
from puzzle.variants import keep_spec, site_item
from tests.report.pages import problem_of, shape_of, solution_of


def test_points_are_architectures_with_what_they_cost_and_break() -> None:
    problem, shape = problem_of(6), shape_of(6)
    solution = solution_of(problem)
    assert solution is not None
    found = searched(problem, shape, solution)
    trade = found.trade
    assert isinstance(trade, Trade) and trade.chosen is not None and 10 < len(trade.points) <= FRONT_POINTS
    assert trade.points[0].objective <= REACH * solution.objective_nats
    for point in (*trade.points[::9], trade.chosen):
        names = [trade.blocks[block].name for block in point.blocks]
        items = [f"{site}.{name}" for site, name in zip(problem.sites, names, strict=True)]
        totals = problem.totals(items)
        assert point.cost == pytest.approx(totals["params"], rel=1e-12)
        assert point.objective == pytest.approx(float(problem.objective_of(items)), rel=1e-9)
        assert point.totals == pytest.approx([totals[name] for name, _ in trade.told], rel=1e-12)
        assert point.broken == (() if problem.rows[0].holds(items) else (problem.rows[0].written,))
    assert trade.chosen.blocks == searched(problem, shape, solution).trade.chosen.blocks  # type: ignore[union-attr]
    assert trade.teacher_cost == found.reached[0].teacher and found.reached[0].chosen == trade.chosen.cost


def test_of_each_layer_something_is_chosen_and_shares_of_the_front_add_up() -> None:
    problem = problem_of(5)
    solution = solution_of(problem)
    assert solution is not None
    for found in searched(problem, shape_of(5), solution).maps:
        for layer, row in enumerate(found.chosen):
            assert row is not None
            assert f"L{layer:03d}.{found.part}.{found.variants[row]}" in solution.items
            assert sum(values[layer] or 0.0 for values in found.taken) == pytest.approx(1.0)


def test_the_front_is_of_what_is_minimised_or_limited_and_costs_something() -> None:
    problem, shape = problem_of(3), shape_of(3)
    params, speed = problem.quantities
    memory = replace(params, name="chat.memory_gib")
    quality = Row(Quantity("ce_delta_nats", "nats", problem.objective), "ce_delta_nats ≤ 1", upper=Fraction(1))
    rate = Row(speed, "chat.output_tok_per_s ≥ 1", lower=Fraction(1))
    quantities = (params, speed, memory, quality.quantity)
    for rows, cost, name in (
        ((quality, rate), None, "chat.memory_gib"),
        ((quality, Row(params, "params ≤ 1", upper=Fraction(1))), None, "params"),
        ((quality,), params, "params"),
    ):
        trade = searched(replace(problem, rows=rows, quantities=quantities, cost=cost), shape, None).trade
        assert isinstance(trade, Trade) and trade.cost_name == name


def test_a_points_limit_is_as_clear_of_it_as_the_search_will_ask() -> None:
    problem, shape = problem_of(3), shape_of(3)
    params, speed = problem.quantities
    problem = replace(problem, quantities=(replace(params, margin=0.1), speed))
    trade = searched(problem, shape, None).trade
    assert isinstance(trade, Trade)
    point = trade.points[2]
    limit = float(to_get(point, trade).removeprefix("constraints: {params: ").removesuffix("}"))
    assert point.cost <= limit * 0.9 < point.cost * (1 + 1e-5)


def test_the_teachers_own_blocks_are_all_of_themselves_experts_too() -> None:
    shape = replace(shape_of(4), moe_layers=(1, 3), num_experts=8, num_active_experts=2, moe_intermediate_size=64)
    layers = layers_of(shape, [site_item(site, keep_spec(shape, site)) for site in shape.sites])
    assert {block.share for layer in layers for block in layer.blocks} == {1.0}


@example(low=9.0, ratio=1.0000000000000002, logarithmic=True, start=0.0)
@given(
    low=st.floats(1e-9, 1e9), ratio=st.floats(1.0, 1e6), logarithmic=st.booleans(), start=st.sampled_from([0.0, 300.0])
)
def test_a_scale_has_ticks_within_it_and_keeps_the_order(
    low: float, ratio: float, logarithmic: bool, start: float
) -> None:
    scale = Scale.over([low, low * ratio], start, 150.0, logarithmic)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 20 and ticks == sorted(ticks)
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    ends = sorted([start, 150.0])
    assert all(ends[0] <= scale.at(value) <= ends[1] for value in (low, low * ratio, *ticks))


def test_heat_takes_the_first_step_for_the_least_and_the_last_for_the_most() -> None:
    linear = HeatScale.over([(0.0, 5.0, None), (10.0, 2.0, 3.0)])
    assert [linear.step(value) for value in (0.0, 4.9, 10.0)] == [0, 4, 8]
    logarithmic = HeatScale.over([(0.0, 0.001), (1.0, 0.1)], logarithmic=True)
    assert [logarithmic.step(value) for value in (0.0, 0.001, 0.032, 1.0)] == [0, 0, 4, 8]
    assert HeatScale.over([(1.0, 1.0)]).step(1.0) == 0  # all alike


@pytest.mark.parametrize(
    ("value", "text"),
    [(5771520, "5.772M"), (1423.11, "1423"), (0.0313349, "0.03133"), (70e9, "70B"), (12345, "12.35k"), (-2.5, "-2.5")],
)
def test_figures_have_four_digits(value: float, text: str) -> None:
    assert figure(value) == text
