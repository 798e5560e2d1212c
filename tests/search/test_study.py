"""The study of what no sum models: bounds are kept, answers come first, what is stopped ends as it would have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from search_factories import all_choices, make_problem

from puzzle.search import mip
from puzzle.search.moves import Chosen
from puzzle.search.refine import Refined, Settings
from puzzle.search.study import _excess, _options, study

SETTINGS = Settings(evaluations=16, count=3, seed=5)


class Stopped(Exception):
    pass


class World:
    """A task that likes few changes from one site to the next, which no sum of scores tells."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.problem = make_problem(random.Random(2), 6, 4, ("max",), wide=2, conflicts=1)
        self.answers = tuple(one.items for one in mip.solve([self.problem], {}, SETTINGS.count, 0.2).solutions)
        self.known: dict[Chosen, list[float] | None] = {}
        self.asked: list[Chosen] = []
        self.stop_after = stop_after

    def truth(self, chosen: Chosen) -> float:
        ranks = [int(item_id[-1]) for item_id in chosen]
        return 1.0 + sum(abs(one - other) for one, other in zip(ranks, ranks[1:], strict=False))

    def measure(self, wanted: Sequence[Chosen]) -> list[list[float] | None]:
        for chosen in wanted:
            if chosen not in self.known:
                if len(self.asked) == self.stop_after:
                    raise Stopped
                self.asked.append(chosen)
                self.known[chosen] = [self.truth(chosen) - 0.5, self.truth(chosen) + 0.5]
        return [self.known[chosen] for chosen in wanted]

    def run(self, journal: Path) -> Refined:
        return study(self.problem, self.answers, self.measure, SETTINGS, journal)


def test_what_is_evaluated_keeps_every_bound_begins_with_the_answers_and_gets_better(tmp_path: Path) -> None:
    world = World()
    found = world.run(tmp_path / "not there yet" / "journal")
    assert tuple(world.asked[:3]) == world.answers
    assert [trial.source for trial in found.trials] == ["search"] * 3 + ["study"] * 13
    assert tuple(trial.items for trial in found.trials) == tuple(world.asked)
    assert len(set(world.asked)) == SETTINGS.evaluations
    assert all(not world.problem.violations(chosen) for chosen in world.asked)
    assert found.best.true == min(map(world.truth, world.asked)) < min(map(world.truth, world.answers))


@pytest.mark.parametrize("stop_after", [0, 5])
def test_stopped_and_started_again_it_ends_as_it_would_have(stop_after: int, tmp_path: Path) -> None:
    whole = World()
    expected = whole.run(tmp_path / "whole")
    world = World(stop_after)
    with pytest.raises(Stopped):
        world.run(tmp_path / "journal")
    world.stop_after = None
    assert world.run(tmp_path / "journal") == expected
    assert world.asked == whole.asked
    assert world.run(tmp_path / "journal") == expected  # nothing is left to do
    assert world.asked == whole.asked


def test_outputs_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    world = World()
    world.known = dict.fromkeys(world.answers[:2])
    found = world.run(tmp_path / "journal")
    assert [trial.values for trial in found.trials[:2]] == [(), ()]
    assert found.best.values


def test_constraints_are_above_zero_exactly_where_something_is_broken() -> None:
    problem = make_problem(random.Random(4), 4, 3, ("max", "min", "eq"), wide=2, conflicts=2)
    broken = 0
    for chosen in all_choices(problem):
        excess = _excess(problem, chosen)
        assert any(value > 0 for value in excess.values()) == bool(problem.violations(chosen))
        broken += bool(problem.violations(chosen))
    assert broken > 0
    assert _excess(problem, ())["sites"] == len(problem.sites)
    twice = (*next(iter(all_choices(problem))), problem.items[0].id, problem.items[1].id)
    assert _excess(problem, twice)["sites"] == 2


def test_on_offer_are_the_answers_and_their_neighbours_by_score() -> None:
    problem = make_problem(random.Random(0), 3, 5, ("max",), wide=2)
    by_score = {
        site: sorted((one.id for one in problem.items if one.sites == (site,)), key=problem.objective.__getitem__)
        for site in problem.sites
    }
    wide = problem.items[-1]
    rest = [by_score[site][4] for site in problem.sites if site not in wide.sites]
    answers = [tuple(by_score[site][2] for site in problem.sites), problem.in_order([wide.id, *rest])]
    options = _options(problem, answers)
    for site in problem.sites:
        expected = set(by_score[site][1:4] if site in wide.sites else by_score[site][1:])
        assert set(options[str(site)]) - {wide.id} == expected
    assert wide.id in options[str(wide.sites[0])]
    only_wide = _options(problem, answers[1:])
    assert set(only_wide[str(wide.sites[1])]) == set(by_score[wide.sites[1]][:2])
