"""What is behind the sliders: limits, exact answers, nearest values, the constraint file that yields an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from puzzle import yamlfiles
from puzzle.config import ConstraintFile
from puzzle.notebook.front import ParetoFront
from puzzle.notebook.sliders import Sliders, price_words
from puzzle.notebook.solution import SolutionView
from puzzle.search import problems
from puzzle.search.linear import EXACT, minimise
from puzzle.types import ConfigError, Costs, InfeasibleError
from tests.notebook.conftest import SPACE, MakeFront


def found_by_file(view: SolutionView) -> float:
    """The best sum of scores that a search under the view's constraint file finds."""
    file = yamlfiles.parse(ConstraintFile, view.constraints, Path("constraints"))
    run = view.tables.run
    made = problems(run.shape, run.items, view.tables.scores, Costs(), file, run.space.conflicts())
    choices = [minimise(one, one.objective, one.rows) for one in made]
    return min(float(choice.total) for choice in choices if choice is not None)


def test_there_is_a_slider_for_each_constraint_and_one_for_the_fronts_cost(make_front: MakeFront) -> None:
    sliders = Sliders.of(make_front(constraints={"constraints": {"params": {"min": 9000, "max": "90%"}}}))
    told = [(limit.name, limit.side, limit.whole) for limit in sliders.limits]
    assert told == [("params", "min", True), ("params", "max", True), ("chat.memory_gib", "max", False)]
    for limit in sliders.limits:
        assert limit.least <= limit.start <= limit.most
        assert 50 < (limit.most - limit.least) / limit.step < 500
        for value in (limit.start, limit.most, limit.least):  # the browser keeps it to steps
            assert limit.on_grid(value) == pytest.approx(value, rel=1e-12)
    free = sliders.solve(sliders.start, effort=EXACT)
    assert free.problem.rows[2].slack(free.solution.items) >= 0


def test_a_position_is_solved_exactly_and_its_file_yields_the_answer(make_front: MakeFront) -> None:
    sliders = Sliders.of(make_front())
    (limit,) = sliders.limits
    views = [sliders.solve([value], effort=EXACT) for value in (limit.start, 1.2 * limit.start, limit.most)]
    objectives = [view.solution.objective_nats for view in views]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] > objectives[1] > objectives[2] == 0  # the last is the teacher
    for view in views:
        assert found_by_file(view) == view.solution.objective_nats
    assert views[0].solution.objective_se is not None
    assert {round(view.solution.totals["chat.batch_size"]) for view in views} <= {2, 8}


def test_while_it_moves_an_answer_is_within_the_gap(make_front: MakeFront) -> None:
    sliders = Sliders.of(make_front(20))
    (limit,) = sliders.limits
    exact = sliders.solve([limit.start], effort=EXACT)
    quick = sliders.solve([limit.start], start=exact.solution.items)
    assert quick.solution.objective_nats == pytest.approx(exact.solution.objective_nats, rel=1e-3)


def test_where_nothing_fits_it_says_what_does(make_front: MakeFront) -> None:
    limits = {"constraints": {"memory_gib": "60%", "layers_with_attention": {"eq": 3}}}
    sliders = Sliders.of(make_front(constraints=limits))
    memory, layers = sliders.limits
    assert (layers.side, layers.least, layers.most) == ("eq", 0, 3)
    with pytest.raises(InfeasibleError, match="the smallest possible is"):
        sliders.solve([memory.least, 3])
    near = sliders.nearest([memory.least, 3], 0)
    assert near is not None
    assert near > memory.least
    view = sliders.solve([near, 3], effort=EXACT)
    assert view.solution.totals["layers_with_attention"] == 3
    with pytest.raises(InfeasibleError):
        sliders.solve([near * (1 - 1e-9), 3])
    assert sliders.nearest([memory.most, 4], 1) == 3
    assert sliders.nearest([0.0, 3], 1) is None  # no number of layers helps


def test_prices_are_differences_of_exact_answers(make_front: MakeFront) -> None:
    sliders = Sliders.of(make_front())
    (limit,) = sliders.limits
    view = sliders.solve([limit.start], effort=EXACT)
    (story,) = sliders.prices(view)
    looser = sliders.solve([limit.start + float(story.step)], effort=EXACT)
    assert story.looser is not None
    assert story.looser <= 0
    words = price_words(story, "nats")
    assert story.binds
    assert words.startswith("binds; ")
    assert "more: " in words
    assert min(looser.solution.objective_nats - view.solution.objective_nats, 0) == pytest.approx(
        story.looser, abs=1e-9
    )
    (at_most,) = sliders.prices(sliders.solve([limit.most], effort=EXACT))
    assert price_words(at_most, "nats") == "does not bind"


def test_a_cost_as_the_objective_has_no_prices(make_front: MakeFront) -> None:
    asked = {"constraints": {"kl_nats": {"max": 1.0}}, "objective": "params"}
    sliders = Sliders.of(make_front(constraints=asked, cost="params"))
    assert [limit.name for limit in sliders.limits] == ["kl_nats", "params"]
    view = sliders.solve(sliders.start, effort=EXACT)
    assert sliders.prices(view) == ()
    assert view.solution.objective_nats <= 1.0
    cost, quality = sliders.point(view)
    assert (cost, quality) == (view.solution.totals["params"], view.solution.objective_nats)


@pytest.mark.parametrize("cost", ["params", "chat.memory_gib"])
def test_every_point_of_a_front_is_what_its_constraint_file_finds(make_front: MakeFront, cost: str) -> None:
    front = make_front(2, cost=cost)
    assert len(front) >= 5
    for point in range(len(front)):
        view = front.at(point)
        assert found_by_file(view) == pytest.approx(front.front.objective[point], rel=1e-12, abs=1e-12)
        assert not view.problem.violations(view.solution.items)
    with pytest.raises(ConfigError, match=f"the front has points 0 to {len(front) - 1}"):
        front.at(len(front))
    with pytest.raises(ConfigError, match="the least is"):
        front.within(0)
    assert front.within(float(front.front.cost[3]) * 1.0000001).solution == front.at(3).solution


def test_a_front_of_one_point_is_the_teacher(make_front: MakeFront) -> None:
    only = {"attention": ["keep"], "ffn": ["keep"]}
    front = make_front(constraints={"constraints": {}}, space=only)
    assert len(front) == 1
    assert front._repr_png_().startswith(b"\x89PNG")
    sliders = Sliders.of(front)
    assert sliders.solve(sliders.start).solution.objective_nats == 0
    assert front.at(0).totals.share.dropna().eq(1).all()


def test_two_hundred_layers(make_front: MakeFront) -> None:
    front = make_front(200, cost="params", space={**SPACE, "attention": ["keep", "skip"], "ffn": ["keep", "skip"]})
    view = Sliders.of(front).solve([limit.start for limit in Sliders.of(front).limits])
    assert len(view.layers) == 200
    assert view.plot()._repr_png_().startswith(b"\x89PNG")
    assert view._repr_html_().count("<title>") == 400


def test_estimated_scores_are_told(make_front: MakeFront) -> None:
    front = make_front()
    scores = front.tables.scores
    guessed = {key: replace(score, method="one-pass") for key, score in scores.scores.items()}
    tables = replace(front.tables, scores=replace(scores, scores=guessed))
    view = ParetoFront.of(tables, "params", "kl_nats").at(0)
    assert "6 of 6 scores are estimates from one pass" in view._repr_html_()
    assert "estimates" not in front.at(0).remarks
