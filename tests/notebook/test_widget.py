"""The explorer without a notebook: what moves when a slider does, and what a click brings."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from puzzle.types import ConfigError
from tests.notebook.conftest import MakeFront


def test_a_slider_changes_the_architecture_and_says_what_the_limit_costs(make_front: MakeFront) -> None:
    explorer = make_front().explore()
    (slider,) = explorer.controls
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()
    assert explorer.chosen is not None
    before, drawn = explorer.chosen, explorer._strips.value
    slider.value = slider.value * 0.8
    after = explorer.chosen
    assert after.solution.items != before.solution.items
    assert after.solution.status == "optimal"
    assert explorer._strips.value != drawn
    assert f"KL {after.solution.objective_nats:.4f} ± " in explorer._headline.value
    assert f"≤ {slider.value:.4g} GiB" in explorer._labels[0].value
    assert "binds; " in explorer._told[0].value
    point = explorer.figure.data[2]
    assert (point.x[0], point.y[0]) == explorer.sliders.point(after)
    slider.value = 0.00036  # where the front is steep
    assert explorer.figure.data[2].y[0] < explorer.figure.layout.yaxis.range[1]
    slider.value = slider.max
    assert explorer.chosen.solution.objective_nats == 0
    assert "does not bind" in explorer._told[0].value


def test_where_nothing_fits_it_says_so_and_goes_to_the_nearest(make_front: MakeFront) -> None:
    explorer = make_front().explore()
    (slider,) = explorer.controls
    held = explorer.chosen
    slider.value = slider.min
    assert "Nothing fits here: chat batch size 2: chat.memory_gib ≤ " in explorer._message.value
    assert "the smallest possible is" in explorer._message.value
    assert explorer.chosen is held
    assert explorer._go.layout.display != "none"
    explorer._go.click()
    assert explorer._message.value == ""
    assert explorer._go.layout.display == "none"
    assert explorer.chosen is not held
    (limit,) = explorer.sliders.limits
    least = explorer.sliders.front.at(0).solution.totals["chat.memory_gib"]
    assert least <= slider.value < least + limit.step


def test_a_point_is_clicked_and_compared_with_what_the_sliders_stand_for(make_front: MakeFront) -> None:
    front = make_front()
    explorer = front.explore()
    explorer._clicked(None, SimpleNamespace(point_inds=[1]), None)
    assert explorer.compared is not None
    assert explorer.compared.solution.items == front.at(1).solution.items
    assert "chat.memory_gib:\n    max: " in explorer._figures.value
    assert "difference" in explorer._figures.value
    assert explorer._strips.value.count("<svg") == 2
    explorer._keep.click()
    assert explorer.compared is explorer.chosen
    explorer._drop.click()
    assert explorer.compared is None
    assert explorer._strips.value.count("<svg") == 1
    explorer._clicked(None, SimpleNamespace(point_inds=[]), None)  # beside the line
    assert explorer.compared is None


def test_limits_that_cannot_be_met_open_it_without_an_answer(make_front: MakeFront) -> None:
    explorer = make_front(constraints={"constraints": {"params": 5}}).explore()
    slider = explorer.controls[0]
    assert explorer.chosen is None
    assert "no architecture yet" in explorer._headline.value
    assert "params ≤ 5 parameters cannot be met" in explorer._message.value
    assert explorer._strips.value.count("<svg") == 0
    explorer._go.click()
    assert explorer.chosen is not None
    least, step = explorer.sliders.front.problem.totals(explorer.chosen.solution.items)["params"], slider.step
    assert least <= explorer.values[0] < least + step


def test_a_front_of_one_point_is_drawn(make_front: MakeFront) -> None:
    explorer = make_front(constraints={"constraints": {}}, space={"attention": ["keep"], "ffn": ["keep"]}).explore()
    assert explorer.chosen is not None
    assert explorer.chosen.solution.objective_nats == 0
    assert len(explorer.figure.data[0].x) == len(explorer.figure.data[1].x) == 1


@pytest.mark.parametrize("package", ["plotly.graph_objects", "ipywidgets", "anywidget"])
def test_without_what_draws_it_it_says_what_to_install(
    make_front: MakeFront, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.delitem(sys.modules, "puzzle.notebook.widget", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"explore\(\) needs {package.split('.')[0]}.*puzzle-nas\[explore\]"):
        make_front().explore()
